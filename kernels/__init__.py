"""Math on tensors: the kernels of alure. They know no files, users or configurations.

Every operator has one signature and several backends (`backend="auto" | "triton" | "native" | "reference"`);
a backend named explicitly never falls back silently.
"""

from alure.kernels.attention import (
    AttentionPlan,
    PositionBias,
    TimeBias,
    jagged_attention,
    position_thresholds,
    time_thresholds,
)
from alure.kernels.candidates import Candidates, Engagements, ItemRules, NeighborLists, join_candidates
from alure.kernels.compression import (
    DotLinearCompression,
    InteractionCompression,
    InteractionLayer,
    compress,
    compress_int8,
)
from alure.kernels.encoding import EventEncoder, encode_events
from alure.kernels.jagged import to_jagged
from alure.kernels.neighbors import assign_clusters, grouped_topk, train_kmeans
from alure.kernels.pagerank import PageRanks, personalized_pagerank
from alure.kernels.quantization import ResidualCodebooks, residual_quantize, train_residual_codebooks
from alure.kernels.rowwise import rms_norm, swiglu

__all__ = [
    "AttentionPlan",
    "Candidates",
    "DotLinearCompression",
    "Engagements",
    "EventEncoder",
    "InteractionCompression",
    "InteractionLayer",
    "ItemRules",
    "NeighborLists",
    "PageRanks",
    "PositionBias",
    "ResidualCodebooks",
    "TimeBias",
    "assign_clusters",
    "compress",
    "compress_int8",
    "encode_events",
    "grouped_topk",
    "jagged_attention",
    "join_candidates",
    "personalized_pagerank",
    "position_thresholds",
    "residual_quantize",
    "rms_norm",
    "swiglu",
    "time_thresholds",
    "to_jagged",
    "train_kmeans",
    "train_residual_codebooks",
]

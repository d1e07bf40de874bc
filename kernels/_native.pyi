"""The compiled module: C++ of kernels/native. NumPy arrays exactly of these types, C-contiguous; no conversion."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Float32: TypeAlias = NDArray[np.float32]
_Int8: TypeAlias = NDArray[np.int8]
_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]
_Uint8: TypeAlias = NDArray[np.uint8]
_Bool: TypeAlias = NDArray[np.bool_]
_Uint16: TypeAlias = NDArray[np.uint16]

def join_candidates(
    neighbor_offsets: _Int64,
    neighbor_ids: _Int32,
    similarities: _Float32,
    engagement_offsets: _Int64,
    items: _Int32,
    weights: _Float32,
    reasons: _Uint8,
    exclude_offsets: _Int64 | None,
    exclude_items: _Int32 | None,
    eligible: _Bool | None,
    groups: _Int32 | None,
    group_cap: int,
    cap: int,
    num_items: int,
    num_threads: int,
) -> tuple[_Int64, _Int32, _Float32, _Uint8]: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...

class Attention:
    """The arguments of one attention, as kernels/attention/arguments.py has them; bfloat16 as its bits, uint16.

    q, k and v may have any strides, if the channels of a head are neighbours.
    """

    def __init__(
        self,
        q: _Float32 | _Uint16,
        k: _Float32 | _Uint16,
        v: _Float32 | _Uint16,
        q_offsets: _Int64,
        k_offsets: _Int64,
        q_timestamps: _Int64 | None,
        k_timestamps: _Int64 | None,
        rules: _Int64 | None,
        groups: _Int64 | None,
        time_thresholds: _Int64 | None,
        time_table: _Float32 | None,
        position_thresholds: _Int64 | None,
        position_table: _Float32 | None,
        q_cyclic: _Float32 | None,
        k_cyclic: _Float32 | None,
        scale: float,
    ) -> None: ...

def attention_forward(
    attention: Attention, out: _Float32 | _Uint16, lse: _Float32, instruction_set: str, num_threads: int
) -> None: ...
def attention_backward(
    attention: Attention,
    grad_out: _Float32 | _Uint16,
    out: _Float32 | _Uint16,
    grad_lse: _Float32,
    lse: _Float32,
    dq: _Float32 | _Uint16,
    dk: _Float32 | _Uint16,
    dv: _Float32 | _Uint16,
    dk_sums: _Float32,
    dv_sums: _Float32,
    d_time_table: _Float32 | None,
    d_position_table: _Float32 | None,
    d_q_cyclic: _Float32 | None,
    d_k_cyclic: _Float32 | None,
    instruction_set: str,
    num_threads: int,
) -> None: ...

class Encoding:
    """The arguments of one encoding, in the order of kernels/encoding/ops.py; tables of bfloat16 as their bits."""

    def __init__(
        self,
        ids: _Int64,
        table: _Float32 | _Uint16,
        offsets: _Int64,
        timestamps: _Int64,
        reference_times: _Int64,
        counts: _Int64 | None,
        dense: _Float32 | None,
        utc_offsets: _Int64 | None,
        id_weight: _Float32,
        time_weight: _Float32,
        bias: _Float32,
        position_table: _Float32 | _Uint16,
        frequency_table: _Float32 | _Uint16,
        periods: _Int64,
        phases: _Float32,
        tau: float,
        dense_weight: _Float32 | None,
    ) -> None: ...

def encode_events(encoding: Encoding, out: _Float32 | _Uint16, instruction_set: str, num_threads: int) -> bool: ...
def encode_events_backward(
    encoding: Encoding,
    grad_out: _Float32,
    d_table: _Float32,
    d_dense: _Float32 | None,
    d_id_weight: _Float32,
    d_dense_weight: _Float32 | None,
    d_time_weight: _Float32,
    d_bias: _Float32,
    d_position: _Float32,
    d_frequency: _Float32,
    d_phases: _Float32,
    instruction_set: str,
    num_threads: int,
) -> bool: ...
def rms_norm(
    x: _Float32 | _Uint16,
    weight: _Float32,
    epsilon: float,
    out: _Float32 | _Uint16,
    instruction_set: str,
    num_threads: int,
) -> None: ...
def rms_norm_backward(
    grad: _Float32 | _Uint16,
    x: _Float32 | _Uint16,
    weight: _Float32,
    epsilon: float,
    d_x: _Float32 | _Uint16,
    d_weight: _Float32,
    instruction_set: str,
    num_threads: int,
) -> None: ...
def swiglu(gate_up: _Float32 | _Uint16, out: _Float32 | _Uint16, instruction_set: str, num_threads: int) -> None: ...
def swiglu_backward(
    grad: _Float32 | _Uint16,
    gate_up: _Float32 | _Uint16,
    d_gate_up: _Float32 | _Uint16,
    instruction_set: str,
    num_threads: int,
) -> None: ...
def search_neighbors(
    queries: _Float32,
    database: _Float32,
    list_offsets: _Int64,
    probes: _Int64,
    rank: _Int64,
    exclude_row: _Int64,
    keys: _Int64,
    metric: str,
    instruction_set: str,
    num_threads: int,
) -> bool: ...
def assign_clusters(
    x: _Float32,
    centroids: _Float32,
    scores: _Float32,
    index: _Int64,
    metric: str,
    instruction_set: str,
    num_threads: int,
) -> None: ...

class DotLinear:
    """x, float32 or the bits of bfloat16, and the parameters of one dot-linear compression."""

    def __init__(
        self,
        x: _Float32 | None,
        x_bfloat16: _Uint16 | None,
        linear: _Float32,
        mix: _Float32,
        hidden_weight: _Float32,
        hidden_bias: _Float32,
        output_weight: _Float32,
        output_bias: _Float32,
        gate: _Float32,
    ) -> None: ...

def compress_dot_linear(
    given: DotLinear, embeddings: _Float32, hidden: _Float32, instruction_set: str, num_threads: int
) -> None: ...
def compress_dot_linear_backward(
    given: DotLinear,
    grad: _Float32,
    hidden: _Float32,
    d_x: _Float32,
    d_weights: tuple[_Float32, _Float32, _Float32, _Float32, _Float32, _Float32, _Float32],
    instruction_set: str,
    num_threads: int,
) -> None: ...
def compress_dot_linear_int8(
    given: DotLinear, codes: _Int8, scales: _Float32, instruction_set: str, num_threads: int
) -> None: ...

class ClusterPoints:
    """Points x [n, d], packed to be assigned to ever new centroids."""

    def __init__(self, x: _Float32, metric: str, instruction_set: str, num_threads: int) -> None: ...
    def assign(self, centroids: _Float32, nearest: _Int64, num_threads: int) -> None: ...
    def reassign(self, centroids: _Float32, nearest: _Int64, num_threads: int) -> bool: ...

def add_to_clusters(
    x: _Float32,
    before: _Int64 | None,
    nearest: _Int64,
    sums: NDArray[np.float64],
    instruction_set: str,
    num_threads: int,
) -> bool: ...
def personalized_pagerank(
    offsets: _Int64,
    neighbors: _Int32,
    weights: _Float32 | None,
    sources: _Int64,
    alpha: float,
    epsilon: float,
    scores: _Float32,
    ids: _Int64,
    lost: _Float32,
    num_threads: int,
) -> None: ...

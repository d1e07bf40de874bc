"""Ours, by the backend of the device: a dtype that it refuses is left out rather than taken by the reference."""

from torch import Tensor

from alure.bench.histories import Histories
from alure.bench.peers import Peer
from alure.kernels import TimeBias, jagged_attention
from alure.kernels.attention import AttentionPlan


def alure(histories: Histories, with_bias: bool, planned: bool = True) -> Peer:
    """The plan is made beforehand, as a model makes one for all its layers; FlexAttention's block mask is too."""
    backend = "triton" if histories.device.type == "cuda" else "native"
    bias, offsets = histories.bias, histories.offsets
    times = histories.timestamps if with_bias else None
    thresholds = bias.thresholds if with_bias else None
    plan = AttentionPlan(offsets, q_timestamps=times, time_thresholds=thresholds) if planned else None

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        time_bias = None if table is None else TimeBias(bias.thresholds, table)
        if plan is not None:
            return jagged_attention(q, k, v, plan=plan, time_bias=time_bias, backend=backend)
        return jagged_attention(q, k, v, offsets, q_timestamps=times, time_bias=time_bias, backend=backend)

    return Peer(attend, bias if with_bias else None)

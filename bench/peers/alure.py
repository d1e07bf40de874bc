"""Ours, by the backend of the device: a dtype that it refuses is left out rather than taken by the reference."""

from torch import Tensor

from alure.bench.histories import Histories
from alure.bench.peers import Peer
from alure.kernels import TimeBias, jagged_attention


def alure(histories: Histories, with_bias: bool, backend: str | None = None) -> Peer:
    backend = backend or ("triton" if histories.device.type == "cuda" else "native")
    bias, offsets = histories.bias, histories.offsets
    times = histories.timestamps if with_bias else None

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        time_bias = None if table is None else TimeBias(bias.thresholds, table)
        return jagged_attention(q, k, v, offsets, q_timestamps=times, time_bias=time_bias, backend=backend)

    return Peer(attend, bias if with_bias else None)

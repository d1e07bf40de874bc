"""The compiled module: C++ of kernels/native. NumPy arrays exactly of these types, C-contiguous; no conversion."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Float32: TypeAlias = NDArray[np.float32]
_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]
_Uint8: TypeAlias = NDArray[np.uint8]

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
    cap: int,
    num_items: int,
    num_threads: int,
) -> tuple[_Int64, _Int32, _Float32, _Uint8]: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...

class Attention:
    """The arguments of one attention, in the order of kernels/attention/ops.py."""

    def __init__(
        self,
        q: _Float32,
        k: _Float32,
        v: _Float32,
        q_offsets: _Int64,
        k_offsets: _Int64,
        q_timestamps: _Int64 | None,
        k_timestamps: _Int64 | None,
        time_thresholds: _Int64 | None,
        time_table: _Float32 | None,
        position_thresholds: _Int64 | None,
        position_table: _Float32 | None,
        q_cyclic: _Float32 | None,
        k_cyclic: _Float32 | None,
        causal: bool,
        window_left: int,
        window_right: int,
        scale: float,
    ) -> None: ...

def attention_forward(
    attention: Attention, out: _Float32, lse: _Float32, instruction_set: str, num_threads: int
) -> None: ...
def attention_backward(
    attention: Attention,
    grad_out: _Float32,
    out: _Float32,
    lse: _Float32,
    dq: _Float32,
    dk: _Float32,
    dv: _Float32,
    d_time_table: _Float32 | None,
    d_position_table: _Float32 | None,
    d_q_cyclic: _Float32 | None,
    d_k_cyclic: _Float32 | None,
    instruction_set: str,
    num_threads: int,
) -> None: ...

"""What every backend of jagged attention is given. T is the rows of all sequences together, B the sequences.

Each backend module (reference, kernel, native) has

    forward(q, k, v, batch: Batch, bias: Bias, scale) -> (out [Tq, H, D] like q, lse [H, Tq] float32)
    backward(grad_out, grad_lse, q, k, v, out, lse, batch, bias, scale) -> Gradients

    q [Tq, H, D]  k, v [Tk, Hk, D], where H is a multiple of Hk: query head h reads key head h // (H / Hk)
    grad_out like out, grad_lse like lse

    logits(i, j) = scale · q_i·k_j + time_table[g, h, bucket(t_i − t_j)] + position_table[g, h, bucket(p_i − p_j)]
                   + q_cyclic_i·k_cyclic_j

with g the group of the sequence. A query that sees no key gives a row of zeros and lse = −inf. What is called float32
here is float64 where q is float64.

Which keys a query sees. i is the row of the query in its sequence plus (keys − queries), so the last rows of q and k
are aligned; j is the row of the key; n the keys of the sequence; (left, right, contexts, targets) its rules;
n' = n − targets.

    p_i = min(i, n'), p_j = min(j, n')             every target stands right after the history, in no order
    j < contexts                                   everyone sees the contexts
    or j < n' and 0 <= i < contexts                contexts see all but the targets
    or j < n' and p_i − left <= j <= p_i + right   the window; causal is right = 0
    or j = i >= n'                                 a target sees itself, and nobody else sees it
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

UNLIMITED = 1 << 30  # a window beyond every position


@dataclass(frozen=True)
class Batch:
    """Where the sequences lie, when their rows happened, and who sees whom: nothing here is learned. All is checked."""

    q_offsets: Tensor  # [B + 1] int32 | int64
    k_offsets: Tensor  # [B + 1] int32 | int64
    q_timestamps: Tensor | None  # int64 [Tq], sorted in each sequence; None without a time table
    k_timestamps: Tensor | None  # int64 [Tk]
    rules: Tensor | None  # int64 [B, 4]: left, right, contexts, targets, 0 .. UNLIMITED; None: everyone sees everyone
    groups: Tensor | None  # int64 [B], 0 .. G − 1: the table a sequence reads; None: all read table 0
    plan: tuple[Tensor, ...] = ()  # what the backend's `prepare` made of the batch once, for all heads and layers


@dataclass(frozen=True)
class Bias:
    """Learned biases; None for each that is absent."""

    time_thresholds: Tensor | None  # int64 [buckets − 1], increasing
    time_table: Tensor | None  # [G, H, buckets] float32
    position_thresholds: Tensor | None  # int64 [buckets − 1], increasing
    position_table: Tensor | None  # [G, H, buckets] float32
    q_cyclic: Tensor | None  # [Tq, H, C] float32
    k_cyclic: Tensor | None  # [Tk, C] float32


class Gradients(NamedTuple):
    """Like the tensors they belong to; None for what was None."""

    q: Tensor
    k: Tensor
    v: Tensor
    time_table: Tensor | None
    position_table: Tensor | None
    q_cyclic: Tensor | None
    k_cyclic: Tensor | None


def delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> Tensor:
    """[H, Tq] like grad_lse: Σ_d out · grad_out − grad_lse, which every gradient of a query's weights is less by."""
    wide = grad_lse.dtype
    return (grad_out.to(wide) * out.to(wide)).sum(-1).t().contiguous() - grad_lse

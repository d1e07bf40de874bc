"""A peer's forward pass, or forward and backward, as a call to time and its check against the reference.

The reference computes in float32 from the same inputs. A forward pass is checked on up to 64 queries of each sequence,
a backward on every gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alure.bench.histories import Histories
from alure.bench.peers import Peer
from alure.bench.race import difference
from alure.kernels import TimeBias, jagged_attention

CHECKED = 64

Build = Callable[[Histories], Peer]
Prepared = tuple[Callable[[], Any], Callable[[Any], str]]


def forward(build: Build, reference: "Reference") -> Prepared:
    histories = reference.histories
    peer = build(histories)
    q, k, v = (peer.pack(x) for x in histories.qkv)
    table = peer.bias.table if peer.bias else None

    def check(out: Tensor) -> str:
        return difference(peer.unpack(out)[reference.rows], reference.forward(peer.bias), histories.dtype)

    return (lambda: peer.attend(q, k, v, table)), check


def backward(build: Build, reference: "Reference") -> Prepared:
    """Forward and backward: the gradients of q, k, v and, where there is a bias, of its table."""
    histories = reference.histories
    peer = build(histories)
    q, k, v = (peer.pack(x).detach().clone().requires_grad_() for x in histories.qkv)
    table = peer.bias.table.clone().requires_grad_() if peer.bias else None
    grad_out = peer.pack(histories.grad_out)

    def run() -> tuple[Tensor, ...]:
        wanted = (q, k, v) if table is None else (q, k, v, table)
        return torch.autograd.grad(peer.attend(q, k, v, table), wanted, grad_out)

    def check(found: tuple[Tensor, ...]) -> str:
        packed = [*(peer.unpack(x) for x in found[:3]), *found[3:]]
        pairs = zip(("q", "k", "v", "table"), packed, reference.gradients(peer.bias))
        problems = [(name, difference(got, want, histories.dtype)) for name, got, want in pairs]
        return "; ".join(f"gradient of {name}: {problem}" for name, problem in problems if problem)

    return run, check


class Reference:
    """What the results must be, computed once a bias."""

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        rows = [
            begin + torch.linspace(0, n - 1, min(n, CHECKED)).long()
            for begin, n in zip(histories.offsets.tolist(), histories.lengths)
        ]
        self.rows = torch.cat(rows).to(histories.device)
        self._row_offsets = torch.tensor([0, *(len(some) for some in rows)]).cumsum(0).to(histories.device)
        self._forward: dict[TimeBias | None, Tensor] = {}
        self._gradients: dict[TimeBias | None, tuple[Tensor, ...]] = {}

    def forward(self, bias: TimeBias | None) -> Tensor:
        """Output [rows, H, D] of `rows`."""
        if bias not in self._forward:
            q, k, v = (x.float() for x in self.histories.qkv)
            times = self.histories.timestamps
            self._forward[bias] = jagged_attention(
                q[self.rows],
                k,
                v,
                self._row_offsets,
                self.histories.offsets,
                q_timestamps=times[self.rows] if bias else None,
                k_timestamps=times if bias else None,
                time_bias=bias,
                backend="reference",
            )
        return self._forward[bias]

    def gradients(self, bias: TimeBias | None) -> tuple[Tensor, ...]:
        """Of q, k, v [total, H, D], and of the table where there is one."""
        if bias not in self._gradients:
            q, k, v = (x.float().requires_grad_() for x in (y.detach() for y in self.histories.qkv))
            wanted = [q, k, v]
            if bias is not None:
                bias_with_grad = TimeBias(bias.thresholds, bias.table.clone().requires_grad_())
                wanted.append(bias_with_grad.table)
            out = jagged_attention(
                q,
                k,
                v,
                self.histories.offsets,
                q_timestamps=self.histories.timestamps if bias else None,
                time_bias=bias_with_grad if bias else None,
                backend="reference",
            )
            self._gradients[bias] = torch.autograd.grad(out, wanted, self.histories.grad_out.float())
        return self._gradients[bias]

"""What attention races against. A peer computes softmax attention within the sequences of a batch its own way."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alure.kernels import TimeBias


@dataclass(frozen=True)
class Peer:
    """attend(q, k, v, table) in the peer's own layout; `pack` and `unpack` go there from [total, H, D] and back.

    bias: what the peer adds to the logits; its table is the one that `attend` gets. None: no bias.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    bias: TimeBias | None
    pack: Callable[[Tensor], Tensor] = lambda x: x
    unpack: Callable[[Tensor], Tensor] = lambda x: x

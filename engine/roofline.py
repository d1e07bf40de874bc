"""The least work of every operator that runs: FLOPs of its products, and bytes, each read or written once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from alure.kernels.jagged import segment_ids

TIMED = "roofline "  # a profiler's range around each operator: this and the operator's name


@dataclass
class Least:
    calls: int = 0
    flops: float = 0.0
    moved: float = 0.0  # bytes

    def seconds(self, matrix_rate: float, copy_rate: float) -> float:
        """On a machine of so many FLOP/s and bytes/s: the roofline."""
        return max(self.flops / matrix_rate, self.moved / copy_rate)


class LeastWork(TorchDispatchMode):
    """Inside the block, sums up the work of each operator in `found`; what only makes a view has none.

    FLOPs are those of matrix products and of this package's operators: 0 of all others, which move bytes. Of a table
    that rows are gathered from, these rows count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Least] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # under inference_mode composite operators come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._schema.name
        with record_function(TIMED + name):
            out = func(*args, **kwargs)
        if not any(part.alias_info and not part.alias_info.is_write for part in func._schema.returns):
            given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
            least = self.found.setdefault(name, Least())
            least.calls += 1
            least.flops += _flops(func, name, args, kwargs, given, out)
            least.moved += _moved(name, given, out)
        return out


def _flops(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any], out: Any
) -> float:
    if name in FLOPS:
        return FLOPS[name](given)
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


def _moved(name: str, given: dict[str, Any], out: Any) -> float:
    written = sum(_size(x) for x in tree_leaves(out) if isinstance(x, Tensor))
    table = GATHERED.get(name)
    read = [x for argument, x in given.items() if argument != table]
    total = written + sum(_size(x) for x in tree_leaves(read) if isinstance(x, Tensor))
    if name == "alure::encode_events":
        total += given["ids"].numel() * given["table"][0].nbytes
    elif table is not None:
        total += written
    return total


def _size(x: Tensor) -> int:
    """Bytes; an expanded tensor has only what it is expanded from."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def visible_pairs(q_offsets: Tensor, k_offsets: Tensor, rules: Tensor | None) -> int:
    """Pairs of a query and a key that it sees; the rules are those of `alure.kernels.attention.arguments`."""
    q_lengths, k_lengths = q_offsets.diff().long(), k_offsets.diff().long()
    if rules is None:
        return int((q_lengths * k_lengths).sum())
    total = int(q_offsets[-1])
    sequence = segment_ids(q_offsets, total)
    keys = k_lengths[sequence]
    left, right, contexts, targets = rules[sequence].unbind(1)
    place = torch.arange(total, device=q_offsets.device) - q_offsets[sequence] + keys - q_lengths[sequence]
    history = keys - targets
    contexts = torch.minimum(contexts, history)
    at = torch.minimum(place, history)
    first, last = torch.maximum(at - left, contexts), torch.minimum(at + right, history - 1)
    seen = contexts + (last - first + 1).clamp_min(0)
    seen = torch.where((place >= 0) & (place < contexts), history, seen)
    return int((seen + (place >= history)).sum())


def _attention(given: dict[str, Any]) -> float:
    _, heads, width = given["q"].shape
    return 4.0 * heads * width * visible_pairs(given["q_offsets"], given["k_offsets"], given["rules"])


def _encoding(given: dict[str, Any]) -> float:
    weights = [given[name] for name in ("id_weight", "time_weight", "dense_weight")]
    return 2.0 * given["ids"].shape[0] * sum(weight.numel() for weight in weights if weight is not None)


def _dot_linear(given: dict[str, Any]) -> float:
    users, _, d = given["x"].shape
    of_vectors = given["linear"].numel() + 2 * given["mix"].numel()
    return 2.0 * users * (d * of_vectors + given["hidden_weight"].numel() + given["output_weight"].numel())


FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "alure::jagged_attention": _attention,
    "alure::encode_events": _encoding,
    "alure::compress_dot_linear": _dot_linear,
    "alure::compress_dot_linear_int8": _dot_linear,
}
GATHERED = {
    "aten::index": "self",
    "aten::index_select": "self",
    "aten::gather": "self",
    "aten::embedding": "weight",
    "alure::encode_events": "table",
}

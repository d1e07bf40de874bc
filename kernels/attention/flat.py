"""The flat argument lists that the native and the Triton backend still take; gone once they take Batch and Bias."""

from types import ModuleType

from torch import Tensor

from alure.kernels.attention.arguments import UNLIMITED, Batch, Bias, Gradients


def forward(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, batch: Batch, bias: Bias, scale: float):  # type: ignore[no-untyped-def]
    wide = [x.float() if module.__name__.endswith("native") else x for x in (q, _heads(k, q), _heads(v, q))]
    out, lse = module.flat_forward(*wide, *_flat(batch, bias, scale))
    return out.to(q.dtype), lse


def backward(module: ModuleType, grad_out, q, k, v, lse, delta, batch, bias, scale):  # type: ignore[no-untyped-def]
    wide = [x.float() if module.__name__.endswith("native") else x for x in (grad_out, q, _heads(k, q), _heads(v, q))]
    out, _ = forward(module, q, k, v, batch, bias, scale)
    found = list(module.flat_backward(*wide, out.to(wide[0].dtype), lse, *_flat(batch, bias, scale)))
    for i in (1, 2):
        found[i] = found[i].unflatten(1, (k.shape[1], -1)).sum(2)
    for i in (3, 4):
        found[i] = None if found[i] is None else found[i][None]
    return Gradients(*(x.to(q.dtype) if i < 3 else x for i, x in enumerate(found)))


def _heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _flat(batch: Batch, bias: Bias, scale: float) -> tuple[object, ...]:
    left = right = -1
    if batch.rules is not None and batch.rules.shape[0]:
        first = batch.rules[0]
        if bool((batch.rules != first).any()) or bool(first[2:].any()):
            raise ValueError("this backend does not have these masks yet; use backend='reference'")
        left, right = (-1 if int(x) >= UNLIMITED else int(x) for x in first[:2])
    if batch.groups is not None:
        raise ValueError("this backend does not have groups yet; use backend='reference'")
    tables = [None if table is None else table[0] for table in (bias.time_table, bias.position_table)]
    return (
        batch.q_offsets, batch.k_offsets, batch.q_timestamps, batch.k_timestamps, bias.time_thresholds, tables[0],
        bias.position_thresholds, tables[1], bias.q_cyclic, bias.k_cyclic, False, left, right, scale,
    )  # fmt: skip

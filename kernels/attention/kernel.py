"""Jagged attention in Triton, forward and backward.

Work goes by tiles: a tile of queries of one head runs over the tiles of keys it sees (forward, dq), a tile of keys of
one head over the tiles of queries that see it (dk, dv). A plan, made once per batch (kernel_plan.py), lists them by
class: where a pair of tiles lies in one bucket of every bias, its bias is one scalar, where a few thresholds cross it,
they are compared, elsewhere buckets are looked up; and masks are read only where a pair is hidden. Each class is a loop
of its own. Programs start in the order of the list, the longest first, as processors become free. (Persistent programs
that take tiles in turn would give up that balance, and the loop around the loops costs 10 to 40 registers a thread.)
Each output belongs to one tile and is summed in the order of its pairs, and the sums of a table's gradient are written
tile by tile and added up in a fixed order: no atomics, the same bits every time. Logits in units of log 2, for exp2.
Sizes that change from batch to batch are `do_not_specialize`, here as in the other operators' kernels: Triton would
compile anew, for seconds, for a multiple of 16 and for 1.

    q [Tq, H, D]  k, v [Tk, Hk, D]  fp16 | bf16 | fp32, any strides with contiguous channels
    tables [G, H, buckets] fp32; q_cyclic [Tq, H, C], k_cyclic [Tk, C] fp32; lse, delta [H, Tq] fp32
"""

import torch
import triton.language as tl
from torch import Tensor

from alure.kernels.attention.arguments import Batch, Bias, Gradients, delta
from alure.kernels.attention.kernel_backward import backward_kv_kernel, backward_q_kernel
from alure.kernels.attention.kernel_configs import (
    AHEAD_OF_TIME,
    AHEAD_OF_TIME_SLOW,
    block,
    configs,
    whole_classes,
)
from alure.kernels.attention.kernel_forward import forward_kernel
from alure.kernels.attention.kernel_plan import Plan, Sizes, Tiling, make_plan
from alure.kernels.attention.kernel_tiles import CELLS, CHUNK, cell_values_kernel, crossings_kernel
from alure.kernels.backend import capability, on_device, triton_interprets

__all__ = ["AHEAD_OF_TIME", "AHEAD_OF_TIME_SLOW", "backward", "forward", "prepare"]


def prepare(
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    batch: Batch,
    time_thresholds: Tensor | None,
    position_thresholds: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, ...]:
    """The plan of `batch` for values of `dtype` and `head_dim` on `device`; see kernel_plan.py. Waits for the batch's
    device once. Without gradients it serves the forward alone. The kernels take a plan's tiles, whatever their own
    would be: it serves any device.
    """
    forward_config, q_config, kv_config = configs(dtype, head_dim, device)
    tilings = [
        Tiling(forward_config.block_m, forward_config.block_n),
        Tiling(q_config.block_m, q_config.block_n),
        Tiling(kv_config.block_m, kv_config.block_n, by_keys=True),
    ]
    return make_plan(batch, time_thresholds, position_thresholds, tilings[: 3 if gradients else 1])


def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """out [Tq, H, D] like q and lse [H, Tq]; see arguments.py. With a plan it only launches."""
    total_q, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    if total_q == 0:
        return out, lse
    config = configs(q.dtype, q.shape[2], q.device)[0]
    plan = _plan(q, batch, bias, gradients=False)
    sizes = Sizes(*plan.sizes.shape)
    q, scale, _ = _positive(q, scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    with on_device(q):
        forward_kernel[(len(plan.tiles) * num_heads,)](
            q,
            k,
            v,
            out,
            lse,
            plan.tiles,
            plan.pairs,
            *_biases(plan, bias, q),
            *_strides(q, k, v),
            total_q,
            scale,
            **_constants("forward", q, k, bias, plan, batch.rules is not None),
            PLAIN=q.dtype == torch.bfloat16,
            BLOCK_M=sizes.forward_m,
            BLOCK_N=sizes.forward_n,
            **config.launch_options(),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Batch,
    bias: Bias,
    scale: float,
) -> Gradients:
    """All gradients; the weights are computed again from lse. See arguments.py."""
    _, q_config, kv_config = configs(q.dtype, q.shape[2], q.device)
    plan = _plan(q, batch, bias, gradients=True)
    sizes = Sizes(*plan.sizes.shape)
    q, scale, factor = _positive(q, scale)
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    num_heads, kv_heads = q.shape[1], k.shape[1]
    deltas = delta(grad_out, out, grad_lse)
    lse = torch.where(lse == -torch.inf, torch.inf, lse * _LOG2E)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_q_cyclic = d_k_cyclic = None
    if bias.q_cyclic is not None and bias.k_cyclic is not None:
        d_q_cyclic = torch.empty(bias.q_cyclic.shape, dtype=torch.float32, device=q.device)
        d_k_cyclic = bias.k_cyclic.new_empty((k.shape[0], kv_heads, bias.k_cyclic.shape[1]))
    time_sums, position_sums = (
        None if table is None else table.new_empty((len(plan.q_tiles), num_heads, 2, table.shape[2]))
        for table in (bias.time_table, bias.position_table)
    )
    biases = _biases(plan, bias, q)
    crossings = None if bias.time_table is None else _crossings(plan, bias.time_table.shape[2])
    with on_device(q):
        if len(plan.q_tiles):
            backward_q_kernel[(len(plan.q_tiles) * num_heads,)](
                q,
                k,
                v,
                grad_out,
                lse,
                deltas,
                dq,
                *(q if x is None else x for x in (d_q_cyclic, time_sums, position_sums, crossings)),
                plan.q_tiles,
                plan.q_pairs,
                *biases,
                *_strides(q, k, v, grad_out),
                q.shape[0],
                scale,
                **(constants := _constants("dq", q, k, bias, plan, batch.rules is not None)),
                BLOCK_T=block(constants["TIME_BUCKETS"], CHUNK.value),
                BLOCK_P=block(constants["POSITION_BUCKETS"], CHUNK.value),
                BLOCK_M=sizes.dq_m,
                BLOCK_N=sizes.dq_n,
                **q_config.launch_options(),
            )
        if len(plan.kv_tiles):
            backward_kv_kernel[(len(plan.kv_tiles) * kv_heads,)](
                q,
                k,
                v,
                grad_out,
                lse,
                deltas,
                dk,
                dv,
                q if d_k_cyclic is None else d_k_cyclic,
                plan.kv_tiles,
                plan.kv_pairs,
                *biases,
                *_strides(q, k, v, grad_out),
                q.shape[0],
                scale,
                **_constants("dk dv", q, k, bias, plan, batch.rules is not None),
                BLOCK_M=sizes.dkdv_m,
                BLOCK_N=sizes.dkdv_n,
                **kv_config.launch_options(),
            )
    return Gradients(
        dq if factor == 1 else dq * factor,
        dk,
        dv,
        None if time_sums is None else _by_group(time_sums, plan, bias.time_table),
        None if position_sums is None else _by_group(position_sums, plan, bias.position_table),
        d_q_cyclic,
        None if d_k_cyclic is None else d_k_cyclic.sum(1),
    )


_LOG2E = 1.4426950408889634


def _plan(q: Tensor, batch: Batch, bias: Bias, gradients: bool) -> Plan:
    if batch.plan:
        return Plan(*batch.plan)
    thresholds = bias.time_thresholds, bias.position_thresholds
    return Plan(*prepare(q.dtype, q.shape[2], q.device, batch, *thresholds, gradients))


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale > 0, factor) with the same logits: the kernels take maxima before they scale. dq takes the factor."""
    if scale > 0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (torch.zeros_like(q), 1.0, 0.0)


def _rows(x: Tensor) -> Tensor:
    """x with contiguous channels; rows and heads may lie anywhere."""
    return x if x.stride(2) == 1 else x.contiguous()


def _crossings(plan: Plan, buckets: int) -> Tensor:
    """int32 [Tq, buckets and padding]: how many keys of its sequence a query finds in each bucket or one above it."""
    width = block(buckets, CHUNK.value)
    crossings = torch.empty((len(plan.q_time), width), dtype=torch.int32, device=plan.q_time.device)
    if len(plan.q_tiles):
        with on_device(crossings):
            crossings_kernel[(len(plan.q_tiles), width // CHUNK.value)](
                crossings,
                plan.q_tiles,
                plan.q_time,
                plan.k_time,
                plan.time_thresholds,
                BUCKETS=buckets,
                BLOCK=width,
                BLOCK_M=Sizes(*plan.sizes.shape).dq_m,
            )
    return crossings


def _by_group(sums: Tensor, plan: Plan, table: Tensor) -> Tensor:
    """[tiles, H, 2, buckets] as the kernel has them to the table's [G, H, buckets], in the order of the tiles."""
    sums, rest = sums.unbind(2)
    sums = torch.cat([sums[..., :-1] - rest[..., 1:], sums[..., -1:]], dim=-1)
    groups = plan.q_tiles[:, 9, None, None]
    parts = [torch.where(groups == group, sums, 0.0).sum(0, dtype=torch.float64) for group in range(table.shape[0])]
    return torch.stack(parts).to(table.dtype)


def _biases(plan: Plan, bias: Bias, absent: Tensor) -> list[Tensor]:
    """The twelve tensors of times and biases in the kernels' order; `absent` stands for what is never read."""
    steps = Sizes(*plan.sizes.shape)
    time_values = None if steps.time_steps else bias.time_table
    position_values = None if steps.position_steps else bias.position_table
    time_values, position_values = _cell_values(time_values, plan.time_cells, position_values, plan.position_cells)
    found = (
        plan.q_time,
        plan.k_time,
        plan.time_thresholds,
        plan.time_cells,
        time_values,
        bias.time_table,
        plan.position_thresholds,
        plan.position_cells,
        position_values,
        bias.position_table,
        bias.q_cyclic,
        bias.k_cyclic,
    )
    return [absent if x is None else x.contiguous() for x in found]


def _cell_values(
    time_table: Tensor | None, time_cells: Tensor, position_table: Tensor | None, position_cells: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The tables [G, H, buckets] by cell, [G, H, 4096], of those that are not None; in one launch."""
    some = time_table if time_table is not None else position_table
    if some is None:
        return None, None
    groups, heads, _ = some.shape
    values = [None if x is None else x.new_empty(groups, heads, CELLS.value) for x in (time_table, position_table)]
    tensors = time_table, time_cells, values[0], position_table, position_cells, values[1]
    with on_device(some):
        cell_values_kernel[(groups * heads, 2)](
            *(some if x is None else x.contiguous() for x in tensors),
            TIME_BUCKETS=0 if time_table is None else time_table.shape[2],
            POSITION_BUCKETS=0 if position_table is None else position_table.shape[2],
        )
    return values[0], values[1]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _constants(kernel: str, q: Tensor, k: Tensor, bias: Bias, plan: Plan, rules: bool) -> dict[str, object]:
    channels = 0 if bias.q_cyclic is None else bias.q_cyclic.shape[2]
    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    exact = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    sizes = Sizes(*plan.sizes.shape)
    time_buckets, position_buckets = (0 if x is None else x.shape[2] for x in (bias.time_table, bias.position_table))
    return {
        "HEADS": q.shape[1],
        "KV_HEADS": k.shape[1],
        "HEAD_DIM": q.shape[2],
        "TIME_BUCKETS": time_buckets,
        "POSITION_BUCKETS": position_buckets,
        "CHANNELS": channels,
        "RULES": rules,
        "TIME_STEPS": sizes.time_steps and block(sizes.time_steps, 1),
        "POSITION_STEPS": sizes.position_steps and block(sizes.position_steps, 1),
        "DOT": tl.float32 if triton_interprets() else dtypes[q.dtype],  # the interpreter's bfloat16 dot is wrong
        "PRECISION": "ieee" if exact else "tf32",
        "BLOCK_D": block(q.shape[2], 16),
        "BLOCK_C": block(channels, 16),
        "WHOLE": whole_classes(
            kernel, q.dtype, block(q.shape[2], 16), time_buckets > 0, position_buckets > 0, capability(q.device)
        ),
    }

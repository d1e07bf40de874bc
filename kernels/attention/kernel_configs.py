"""Tile sizes and launch options of the attention kernels, and the cases that are compiled ahead of time.

Those here are untuned: the largest tiles found that compile without spills with both biases, cyclic channels and masks
together. `alure tune` finds better ones on a GPU (tuned.py).
"""

import torch
import triton
import triton.language as tl

from alure.kernels.attention.kernel_backward import backward_kv_kernel, backward_q_kernel
from alure.kernels.attention.kernel_forward import forward_kernel
from alure.kernels.attention.kernel_tiles import (
    CHUNK,
    FEW,
    GENERAL,
    MANY,
    SEVERAL,
    UNIFORM,
    cell_values_kernel,
    crossings_kernel,
)
from alure.kernels.attention.tuned import Config, Configs, tuned
from alure.kernels.backend import HOPPER, capability, triton_interprets

# By padded head_dim: (forward, dq, dk and dv). From sm_90 on tiles of 128 rows feed two groups of four warps.
HOPPER_CONFIGS = {
    16: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 3)),
    32: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 3)),
    64: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 3)),
    128: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(32, 128, 8, 2)),
    256: (Config(128, 32, 8, 2), Config(16, 16, 8, 1, 255), Config(16, 16, 8, 1, 255)),
}
# Hopper's, save where those spill on sm_100.
BLACKWELL_CONFIGS = HOPPER_CONFIGS | {
    16: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 3, 255)),
    64: (Config(128, 64, 8, 3, 255), Config(128, 32, 8, 3), Config(32, 128, 8, 3)),
    128: (Config(128, 64, 8, 3), Config(128, 32, 8, 3, 255), Config(32, 128, 8, 3, 255)),
    256: (Config(64, 32, 8, 2), Config(16, 32, 8, 2, 255), Config(16, 16, 8, 1, 255)),
}
AMPERE_CONFIGS = {
    16: (Config(128, 32, 8, 3), Config(64, 32, 4, 3), Config(32, 64, 4, 3)),
    32: (Config(128, 32, 8, 3), Config(64, 32, 4, 3), Config(32, 64, 4, 3)),
    64: (Config(128, 32, 8, 3), Config(64, 32, 4, 1), Config(16, 64, 4, 2)),
    128: (Config(64, 32, 4, 2), Config(64, 32, 8, 3), Config(32, 64, 8, 1)),
    256: (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1)),
}
# float32 multiplies in float32 unless torch allows tf32, and three tf32 products need twice the registers.
FLOAT_CONFIGS = {
    16: (Config(32, 32, 4, 1, 255), Config(32, 16, 4, 1, 255), Config(16, 32, 4, 1, 255)),
    32: (Config(32, 32, 4, 1, 255), Config(32, 16, 8, 1), Config(16, 32, 4, 1, 255)),
    64: (Config(32, 32, 8, 1, 255), Config(32, 32, 8, 1, 255), Config(16, 16, 4, 1, 255)),
    128: (Config(16, 16, 8, 1, 255), Config(16, 16, 8, 1), Config(16, 16, 8, 1, 255)),
    256: (Config(16, 16, 8, 2, 255), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}
BLACKWELL_FLOAT_CONFIGS = FLOAT_CONFIGS | {
    16: (Config(32, 32, 8, 1), Config(32, 16, 4, 1, 255), Config(16, 32, 4, 1, 255)),
    64: (Config(32, 32, 8, 1, 255), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    256: (Config(16, 16, 8, 2), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}


def configs(dtype: torch.dtype, head_dim: int, device: torch.device) -> Configs:
    """What `alure tune` found for such values on this device, else the untuned."""
    width = block(head_dim, 16)
    return tuned(device).get((dtype, width)) or untuned_configs(dtype, width, device)


def untuned_configs(dtype: torch.dtype, width: int, device: torch.device) -> Configs:
    if triton_interprets():  # one operation at a time, however large
        return Configs(*HOPPER_CONFIGS[width])
    major = capability(device)
    if dtype == torch.float32:
        return Configs(*(FLOAT_CONFIGS if major <= HOPPER else BLACKWELL_FLOAT_CONFIGS)[width])
    table = AMPERE_CONFIGS if major < HOPPER else HOPPER_CONFIGS if major == HOPPER else BLACKWELL_CONFIGS
    return Configs(*table[width])


def block(size: int, smallest: int) -> int:
    return max(smallest, triton.next_power_of_2(size))


def whole_classes(kernel: str, dtype: torch.dtype, head_dim: int, time: bool, position: bool, major: int) -> int:
    """The last class whose tiles `kernel` takes whole, and not in halves: as registers allow."""
    narrow, both = head_dim <= 64 and dtype != torch.float32, time and position
    if kernel == "forward" and narrow:
        last = GENERAL if not both else MANY if major <= HOPPER else FEW
    elif kernel == "forward":
        last = UNIFORM if both else FEW
    elif not narrow:
        last = SEVERAL if kernel == "dq" and head_dim == 128 and dtype != torch.float32 and major == HOPPER else UNIFORM
    elif kernel == "dq" and (major <= HOPPER or head_dim < 64):  # which adds up what each bucket's logits get
        last = UNIFORM if both else SEVERAL if time or position else GENERAL
    elif kernel == "dq":  # of 128 × 32, not × 64
        last = GENERAL
    else:
        last = FEW if both else GENERAL
    return int(last.value)


_KERNELS = {"forward": forward_kernel, "dq": backward_q_kernel, "dk dv": backward_kv_kernel}
_BIASES = {"": (0, 0, 0), "time": (107, 0, 0), "time position cyclic": (107, 55, 4)}  # buckets, buckets, channels


def _case(name: str, dtype: str, head_dim: int, bias: str, config: Config, architectures: tuple[int, ...]):
    kernel = _KERNELS[name]
    time_buckets, position_buckets, channels = _BIASES[bias]
    constexprs = {
        "HEADS": 4,
        "KV_HEADS": 4,
        "HEAD_DIM": head_dim,
        "TIME_BUCKETS": time_buckets,
        "POSITION_BUCKETS": position_buckets,
        "CHANNELS": channels,
        "RULES": True,
        "TIME_STEPS": 0,
        "POSITION_STEPS": 0,
        "DOT": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": head_dim,
        "BLOCK_C": 16,
        "PLAIN": dtype == "bf16",
        "WHOLE": whole_classes(
            name,
            {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
            head_dim,
            time_buckets > 0,
            position_buckets > 0,
            max(architectures) // 10,
        ),
        "BLOCK_T": block(time_buckets, CHUNK.value),
        "BLOCK_P": block(position_buckets, CHUNK.value),
    }
    constexprs = {argument: value for argument, value in constexprs.items() if argument in kernel.arg_names}
    kinds = dict.fromkeys(("p_q", "p_k", "p_v", "p_out", "p_grad_out", "p_dq", "p_dk", "p_dv"), f"*{dtype}:16")
    kinds |= dict.fromkeys(("p_tiles", "p_time_cells", "p_position_cells"), "*i64:16")
    kinds |= dict.fromkeys(("p_pairs", "p_position_thresholds", "p_crossings"), "*i32:16")
    kinds |= {"scale": "fp32", "total_q": "i32"}
    signature = {
        argument: kinds.get(argument, "*fp32:16" if argument.startswith("p_") else "i32:16")
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    pairs, whole = config.block_m * config.block_n, constexprs["WHOLE"]
    classes = (
        {"few": FEW, **({"several": SEVERAL} if name == "dq" else {"many": MANY}), "general": GENERAL}
        if bias
        else {"general": GENERAL}
    )
    loops = {"uniform": pairs} | {
        loop: pairs // (2 if last.value > whole and (bias or name != "forward") else 1)
        for loop, last in classes.items()
    }
    where = {(80,): " ampere", (90,): " hopper", (100,): " blackwell"}.get(architectures, "")
    facts = {"name": " ".join(f"{name} {dtype} {head_dim} {bias}".split()) + where, "loops": loops}
    return kernel, signature, constexprs, config.launch_options(), {**facts, "architectures": architectures}


def _cases(dtype: str, head_dim: int, biases: tuple[str, ...], kernels: tuple[str, ...] = tuple(_KERNELS)):
    if dtype == "fp32":
        tables = [(FLOAT_CONFIGS, (80, 90)), (BLACKWELL_FLOAT_CONFIGS, (100,))]
    else:
        tables = [(HOPPER_CONFIGS, (90,)), (BLACKWELL_CONFIGS, (100,)), (AMPERE_CONFIGS, (80,))]
    return [
        _case(name, dtype, head_dim, bias, config, architectures)
        for table, architectures in tables
        for bias in biases
        for name, config in zip(_KERNELS, table[head_dim])
        if name in kernels
    ]


_CROSSINGS = (
    crossings_kernel,
    {
        "p_crossings": "*i32:16",
        "p_tiles": "*i64:16",
        **dict.fromkeys(("p_q_time", "p_k_time", "p_thresholds"), "*fp32:16"),
    },
    {"BUCKETS": 107, "BLOCK": 128, "BLOCK_M": 128},
    {},
    {"name": "crossings"},
)
_CELL_VALUES = (
    cell_values_kernel,
    {
        "p_time_table": "*fp32:16",
        "p_time_cells": "*i64:16",
        "p_time_values": "*fp32:16",
        "p_position_table": "*fp32:16",
        "p_position_cells": "*i64:16",
        "p_position_values": "*fp32:16",
    },
    {"TIME_BUCKETS": 107, "POSITION_BUCKETS": 55},
    {},
    {"name": "cell values"},
)
_FULL = "time position cyclic"
AHEAD_OF_TIME = [
    _CELL_VALUES,
    _CROSSINGS,
    *_cases("bf16", 64, ("", "time")),
    *_cases("bf16", 64, (_FULL,), ("forward",)),
    *_cases("bf16", 128, ("", "time"), ("forward",)),
    *_cases("fp32", 64, ("time",), ("forward",)),
]
AHEAD_OF_TIME_SLOW = [
    *_cases("bf16", 64, (_FULL,), ("dq", "dk dv")),
    *_cases("bf16", 128, ("", "time"), ("dq", "dk dv")),
    *(case for head_dim in (16, 32, 128, 256) for case in _cases("bf16", head_dim, (_FULL,))),
    *(case for head_dim in FLOAT_CONFIGS for case in _cases("fp32", head_dim, (_FULL,))),
]

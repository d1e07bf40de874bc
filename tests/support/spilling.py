"""A Triton kernel that must spill, and one with named loops, listed as a kernel.py lists what it ships."""

import triton
import triton.language as tl


@triton.jit
def spilling_kernel(p_x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i)
    tl.store(p_x + i, b_x / tl.sum(b_x))  # every element must wait for the sum


@triton.jit
def accumulate(b_sum, p_x, n, BLOCK: tl.constexpr, EXP: tl.constexpr):
    for start in range(0, n, BLOCK):
        b_x = tl.load(p_x + start + tl.arange(0, BLOCK))
        b_sum += tl.exp2(b_x) if EXP else b_x
    return b_sum


@triton.jit
def two_loops_kernel(p_x, p_counter, n, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_sum = accumulate(b_sum, p_x, n, BLOCK, False)  # loop: plain
    b_sum = accumulate(b_sum, p_x, n, BLOCK, True)  # loop: exponential
    tl.atomic_add(p_counter + tl.arange(0, BLOCK), b_sum)


_LOOPS = {"plain": 1024, "exponential": 1024}
AHEAD_OF_TIME = [
    (spilling_kernel, {"p_x": "*fp32:16"}, {"BLOCK": 8192}, {"num_warps": 1}, {"name": "spilling"}),
    (
        two_loops_kernel,
        {"p_x": "*fp32:16", "p_counter": "*fp32:16", "n": "i32"},
        {"BLOCK": 1024},
        {"num_warps": 4},
        {"name": "two loops", "loops": _LOOPS},
    ),
]

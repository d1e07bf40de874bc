"""Kernels with one fault each: the sanitizer must tell it, or no clean run means anything."""

import pytest
import torch
import triton
import triton.language as tl
from support.sanitizer import SanitizerError, sanitized

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
N = 32


@pytest.fixture
def launches_are_sanitized() -> None:
    """Not those of this file: its tests say which."""


@triton.jit
def neighbour_kernel(p_out, p_x):
    """The next program's place, too."""
    pid = tl.program_id(0)
    tl.store(p_out + pid, tl.load(p_x + pid))
    tl.store(p_out + pid + 1, 0.0, mask=pid + 1 < tl.num_programs(0))


@triton.jit
def prefix_kernel(p_out):
    """Reads what the program before has written, which the interpreter has always run by then."""
    pid = tl.program_id(0)
    before = tl.load(p_out + pid - 1, mask=pid > 0, other=0.0)
    tl.store(p_out + pid, before + 1.0)


@triton.jit
def past_the_end_kernel(p_out, p_x, COLUMNS: tl.constexpr):
    i_c = tl.arange(0, COLUMNS)
    tl.store(p_out + i_c, tl.load(p_x + i_c + 1))


@triton.jit
def several_values_kernel(p_out, COLUMNS: tl.constexpr):
    i_c = tl.arange(0, COLUMNS)
    tl.store(p_out + i_c // 2, i_c.to(tl.float32))


@triton.jit
def transpose_kernel(p_out, p_scratch, p_x, ROWS: tl.constexpr, BARRIER: tl.constexpr):
    """Through memory, whose other threads have to be waited for."""
    i_r = tl.arange(0, ROWS)
    at = i_r[:, None] * ROWS + i_r[None, :]
    tl.store(p_scratch + at, tl.load(p_x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_out + at, tl.load(p_scratch + i_r[None, :] * ROWS + i_r[:, None]))


@triton.jit
def count_kernel(p_count, p_out, PLAIN: tl.constexpr):
    if PLAIN:
        tl.store(p_out + tl.program_id(0), tl.load(p_count))
    tl.atomic_add(p_count, 1.0)


def test_one_program_writes_what_another_one_writes() -> None:
    with (
        sanitized(),
        pytest.raises(SanitizerError, match="p_out, byte 4: written by program 0, written by program 1"),
    ):
        neighbour_kernel[(4,)](torch.empty(4), torch.ones(4))


def test_one_program_reads_what_another_one_writes() -> None:
    out = torch.zeros(4)
    prefix_kernel[(4,)](out)
    assert out.tolist() == [1, 2, 3, 4]  # the interpreter alone finds nothing
    with sanitized(), pytest.raises(SanitizerError, match="p_out, byte 0: written by program 0, read by program 1"):
        prefix_kernel[(4,)](out)


def test_outside_of_all_tensors() -> None:
    memory = torch.ones(N + 1)
    with sanitized():
        past_the_end_kernel[(1,)](torch.empty(N), memory, COLUMNS=N)
        with pytest.raises(SanitizerError, match=r"past_the_end_kernel, program 0: read outside .* 0 bytes behind p_x"):
            past_the_end_kernel[(1,)](torch.empty(N), memory[:N], COLUMNS=N)


def test_several_values_for_one_place() -> None:
    with sanitized(), pytest.raises(SanitizerError, match="one store has several values for one place"):
        several_values_kernel[(1,)](torch.empty(N), COLUMNS=N)


def test_other_threads_are_waited_for() -> None:
    x, out, scratch = torch.randn(4, 4), torch.empty(4, 4), torch.empty(4, 4)
    with sanitized():
        transpose_kernel[(1,)](out, scratch, x, ROWS=4, BARRIER=True)
        torch.testing.assert_close(out, x.T, rtol=0, atol=0)
        with pytest.raises(SanitizerError, match=r"p_scratch: written by a tile of \(4, 4\), then read"):
            transpose_kernel[(1,)](out, scratch, x, ROWS=4, BARRIER=False)


def test_atomics_are_in_order_with_each_other_alone() -> None:
    count, out = torch.zeros(1), torch.empty(4)
    with sanitized():
        count_kernel[(4,)](count, out, PLAIN=False)
        assert count.item() == 4
        with pytest.raises(SanitizerError, match=r"p_count: read .* then changed by atomics"):
            count_kernel[(4,)](count, out, PLAIN=True)

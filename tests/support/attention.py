"""Attention problems at random, and the dense masked softmax they are measured against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from alure.kernels import AttentionPlan, PositionBias, TimeBias, jagged_attention, position_thresholds, time_thresholds
from alure.kernels.backend import has_native, has_triton, triton_interprets

NOW = 1_780_000_000  # June 2026
DAY, WEEK = 86_400, 604_800

# (backend, device); Triton runs on the GPU where there is one, and in its interpreter on the CPU where there is none.
TARGETS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("native", "cpu", id="native"),
    pytest.param("triton", "cpu", id="triton"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]


def require(backend: str, device: str) -> None:
    """Skip the test where the backend cannot run on the device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "native" and not has_native():
        pytest.skip("the native module is not built")
    if backend == "triton" and not (has_triton() and (device == "cuda" or triton_interprets())):
        pytest.skip("needs triton, and on the CPU its interpreter")


@dataclass(frozen=True)
class Problem:
    """Arguments of jagged_attention, with every bias; `leaves()` are what gradients are taken of."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    q_timestamps: Tensor
    k_timestamps: Tensor
    time_table: Tensor
    cosine: Tensor
    sine: Tensor
    position_table: Tensor
    time_thresholds: Tensor
    position_thresholds: Tensor
    periods: Tensor
    causal: bool = False
    window_size: tuple[int, int] | None = None
    num_targets: Tensor | None = None
    num_contexts: Tensor | None = None
    groups: Tensor | None = None  # then the tables, cosine and sine begin with a dimension of groups

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.time_table, self.cosine, self.sine, self.position_table]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """q, k, v in `dtype` and the biases in float32 (float64 if that is `dtype`), as fresh leaves on `device`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        for name, x in moved.items():
            if x.is_floating_point():
                target = dtype if name in ("q", "k", "v") else wide
                moved[name] = x.detach().to(device, target).requires_grad_()
            else:
                moved[name] = x.to(device)
        return replace(self, **moved)

    def time_bias(self) -> TimeBias:
        return TimeBias(self.time_thresholds, self.time_table, self.periods, self.cosine, self.sine)

    def position_bias(self) -> PositionBias:
        return PositionBias(self.position_thresholds, self.position_table)

    def run(self, backend: str) -> Tensor:
        return jagged_attention(
            self.q,
            self.k,
            self.v,
            self.q_offsets,
            self.k_offsets,
            q_timestamps=self.q_timestamps,
            k_timestamps=self.k_timestamps,
            time_bias=self.time_bias(),
            position_bias=self.position_bias(),
            causal=self.causal,
            window_size=self.window_size,
            num_targets=self.num_targets,
            num_contexts=self.num_contexts,
            groups=self.groups,
            backend=backend,
        )

    def plan(self) -> AttentionPlan:
        return AttentionPlan(
            self.q_offsets,
            self.k_offsets,
            q_timestamps=self.q_timestamps,
            k_timestamps=self.k_timestamps,
            time_thresholds=self.time_thresholds,
            position_thresholds=self.position_thresholds,
            periods=self.periods,
            causal=self.causal,
            window_size=self.window_size,
            num_targets=self.num_targets,
            num_contexts=self.num_contexts,
            groups=self.groups,
        )

    def run_planned(self, plan: AttentionPlan, backend: str) -> Tensor:
        biases = {"time_bias": self.time_bias(), "position_bias": self.position_bias()}
        return jagged_attention(self.q, self.k, self.v, plan=plan, **biases, backend=backend)

    def visible(self, sequence: int, n_q: int, n_k: int) -> Tensor:
        """bool [n_q, n_k], pair by pair as the docstring of jagged_attention says it."""
        targets = 0 if self.num_targets is None else int(self.num_targets[sequence])
        contexts = 0 if self.num_contexts is None else int(self.num_contexts[sequence])
        left, right = (n_q + n_k, n_q + n_k) if self.window_size is None else self.window_size
        history = n_k - targets
        seen = torch.zeros(n_q, n_k, dtype=torch.bool)
        for row in range(n_q):
            i = row + n_k - n_q
            for j in range(n_k):
                if j < contexts or (i == j and j >= history):
                    seen[row, j] = True
                elif j < history:
                    position = min(i, history)
                    in_window = position - left <= j <= position + (0 if self.causal else right)
                    seen[row, j] = in_window or 0 <= i < contexts
        return seen

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The definition, one sequence at a time in `dtype`, from whole matrices of logits, buckets and masks."""
        q, k, v, table, cosine, sine, positions = (leaf.to(dtype) for leaf in self.leaves())
        outs = []
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        if self.groups is None:
            table, cosine, sine, positions = table[None], cosine[None], sine[None], positions[None]
        for s in range(len(self.q_offsets) - 1):
            rows = slice(int(self.q_offsets[s]), int(self.q_offsets[s + 1]))
            columns = slice(int(self.k_offsets[s]), int(self.k_offsets[s + 1]))
            n_q, n_k = rows.stop - rows.start, columns.stop - columns.start
            if n_q == 0 or n_k == 0:
                outs.append(q.new_zeros(n_q, *q.shape[1:]) + 0 * q[rows])
                continue
            group = 0 if self.groups is None else int(self.groups[s])
            history = n_k - (0 if self.num_targets is None else int(self.num_targets[s]))
            i = (torch.arange(n_q) + (n_k - n_q)).clamp(max=history)
            distance = i[:, None] - torch.arange(n_k).clamp(max=history)
            elapsed = self.q_timestamps[rows, None] - self.k_timestamps[None, columns]
            angle = 2 * math.pi * (elapsed[..., None] % self.periods).double() / self.periods
            logits = torch.einsum("ihd,jhd->hij", q[rows], k[columns]) / math.sqrt(q.shape[-1])
            logits = logits + table[group][:, (elapsed[..., None] >= self.time_thresholds).sum(-1)]
            logits = logits + positions[group][:, (distance[..., None] >= self.position_thresholds).sum(-1)]
            logits = logits + torch.einsum("ijp,hp->hij", angle.cos().to(dtype), cosine[group])
            logits = logits + torch.einsum("ijp,hp->hij", angle.sin().to(dtype), sine[group])
            visible = self.visible(s, n_q, n_k)
            weights = logits.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1) * visible
            outs.append(torch.einsum("hij,jhd->ihd", weights, v[columns]))
        return torch.cat(outs) if outs else 0 * q


def random_problem(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    *,
    num_heads: int = 2,
    num_kv_heads: int | None = None,
    num_groups: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    span: int = 400 * DAY,
) -> Problem:
    """Logits of a few units from every part, times within `span` seconds before 2026-06 with ties, in float64."""
    generator = torch.Generator().manual_seed(seed)
    k_lengths = q_lengths if k_lengths is None else k_lengths

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def offsets(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0)

    def times(lengths: Sequence[int]) -> Tensor:
        parts = [NOW - torch.randint(0, span, (n,), generator=generator) // 7 * 7 for n in lengths]
        return torch.cat([part.sort().values for part in parts] or [torch.zeros(0, dtype=torch.int64)])

    seconds, positions = time_thresholds(per_octave=1, longest=2**26), position_thresholds(longest=24)
    q_times = times(q_lengths)
    tables = (num_heads,) if num_groups is None else (num_groups, num_heads)
    problem = Problem(
        q=normal(sum(q_lengths), num_heads, head_dim),
        k=normal(sum(k_lengths), num_kv_heads or num_heads, head_dim),
        v=normal(sum(k_lengths), num_kv_heads or num_heads, head_dim),
        q_offsets=offsets(q_lengths),
        k_offsets=offsets(k_lengths),
        q_timestamps=q_times,
        k_timestamps=q_times if k_lengths == q_lengths else times(k_lengths),
        time_table=normal(*tables, len(seconds) + 1),
        cosine=normal(*tables, 2),
        sine=normal(*tables, 2),
        position_table=normal(*tables, len(positions) + 1),
        time_thresholds=seconds,
        position_thresholds=positions,
        periods=torch.tensor([DAY, WEEK]),
        groups=None if num_groups is None else torch.randint(0, num_groups, (len(q_lengths),), generator=generator),
    )
    return problem.to(dtype)


def with_gradients(out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """[out, gradient of every leaf], detached, in float64 on the CPU."""
    gradients = torch.autograd.grad(out, leaves, grad_out.to(out), allow_unused=True, materialize_grads=True)
    return [x.detach().double().cpu() for x in (out, *gradients)]


def assert_as_exact_as_plain(
    actual: list[Tensor], exact: list[Tensor], plain: list[Tensor], dtype: torch.dtype, factor: float = 3.0
) -> None:
    """The error against float64 is at most `factor` times that of the plain computation in `dtype`, plus rounding.

    Rounding: of the result to `dtype`, and of logits of up to 16 in float32, from which the backward gets the weights.
    Gradients are what is left of the same terms, grad_out·v, after they cancel (to nothing, where a query sees one
    key), so the largest gradient is the scale of the rounding of all. Those of keys, values and tables sum over all
    queries, whose grad_out is about 1, and what each term was rounded by adds up like a random walk. Terms of tables
    and cycles are rounded to `dtype`; where all pairs share a bucket or a time they cancel, in the plain computation
    to the last bit.
    """
    names = ("out", "dq", "dk", "dv", "d_time_table", "d_cosine", "d_sine", "d_position_table")
    largest = [want.abs().max() if want.numel() else want.new_zeros(()) for want in exact]
    largest[1:] = [torch.stack(largest[1:]).max()] * 7
    ulp = 2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for name, got, want, usual, scale in zip(names, actual, exact, plain, largest, strict=True):
        assert got.isfinite().all(), name
        if want.numel():
            error, allowed = (got - want).abs().max(), factor * (usual - want).abs().max()
            walk = 0.0 if name in ("out", "dq") else 2 * len(actual[0]) ** 0.5 * torch.finfo(torch.float32).eps
            if name.endswith(("table", "cosine", "sine")):
                walk += 0.5 * len(actual[0]) ** 0.5 * torch.finfo(dtype).eps
            rounded = ulp * scale + walk * scale.clamp(min=1.0)
            assert error <= allowed + rounded, f"{name}: error {error:.2e}, plain {allowed / factor:.2e}"

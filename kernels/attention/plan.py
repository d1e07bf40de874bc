"""`AttentionPlan`: what attention over one batch does not learn, checked once and used by every layer and head."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from alure.kernels.attention.arguments import UNLIMITED, Batch
from alure.kernels.attention.backends import backend_module, choose_backend
from alure.kernels.attention.bias import Cycles, check_periods, cycles
from alure.kernels.jagged import check_offsets, check_timestamps, segment_ids

Window = int | tuple[int, int]


class AttentionPlan:
    """Offsets, times and masks of a batch, read and checked once; `jagged_attention(…, plan=plan)` trusts them.

    The arguments are those of `jagged_attention`; thresholds and periods are those of the biases that it will be given.
    A plan saves every layer the checks, the reduction of times to the periods and, on a GPU, the classification of the
    tiles of scores by the buckets they touch. Attention of a plan that is prepared (`prepare`), with biases over the
    plan's own tensors of thresholds and periods, never waits for the device: it only launches. The tensors must not be
    changed afterwards.
    """

    def __init__(
        self,
        q_offsets: Tensor,
        k_offsets: Tensor | None = None,
        *,
        q_timestamps: Tensor | None = None,
        k_timestamps: Tensor | None = None,
        time_thresholds: Tensor | None = None,
        position_thresholds: Tensor | None = None,
        periods: Tensor | None = None,
        causal: bool = False,
        window_size: Window | Sequence[Window | None] | None = None,
        num_targets: Tensor | None = None,
        num_contexts: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        if k_offsets is None:
            k_timestamps = q_timestamps if k_timestamps is None else k_timestamps
        batch = make_batch(q_offsets, k_offsets, causal, window_size, num_targets, num_contexts, groups)
        batch = replace(batch, q_timestamps=q_timestamps, k_timestamps=k_timestamps)
        self.total_q, self.total_k = (int(o[-1]) for o in (batch.q_offsets, batch.k_offsets))
        self.time_thresholds, self.position_thresholds, self.periods = time_thresholds, position_thresholds, periods
        for times, total, name in (
            (q_timestamps, self.total_q, "q_timestamps"),
            (k_timestamps, self.total_k, "k_timestamps"),
        ):
            if times is not None:
                check_rows(times, total, name, q_offsets.device)
            elif time_thresholds is not None:
                raise ValueError(f"{name}: needed by time_thresholds; give int64 unix seconds, one a row")
        check_values(batch, self.total_q, self.total_k, time_thresholds, position_thresholds)
        if periods is not None:
            check_periods(periods)
        self.num_groups = 0 if groups is None or not groups.numel() else int(groups.max()) + 1
        if groups is not None:
            listed = listed_windows(window_size)
            check_groups(groups, self.num_groups if listed is None else len(listed))
        self.batch = batch
        self._prepared: dict[object, tuple[Tensor, ...]] = {}
        self._cycles: dict[torch.dtype, Cycles] = {}
        self._q_groups: Tensor | None = None

    def prepare(
        self, dtype: torch.dtype, head_dim: int, device: torch.device | None = None, backend: str = "auto"
    ) -> None:
        """Make now what attention over values of `dtype` and `head_dim` needs; else its first call does, which within
        torch.compile it cannot.

        device: where they will be, when the plan will be `moved` there (default: where it is).
        """
        device = self.batch.q_offsets.device if device is None else device
        self.prepared(choose_backend(backend, dtype, head_dim, device), dtype, head_dim, device)

    def prepared(self, backend: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
        """What `backend` makes of this batch for such values, made once; without gradients no more than they need."""
        key, gradients = (backend, dtype, head_dim), torch.is_grad_enabled()
        for made_for in (True, gradients):
            if (*key, made_for) in self._prepared:
                return self._prepared[*key, made_for]
        prepare = getattr(backend_module(backend), "prepare", None)
        thresholds = self.time_thresholds, self.position_thresholds
        made = () if prepare is None else prepare(dtype, head_dim, device, self.batch, *thresholds, gradients)
        self._prepared[*key, gradients] = made
        return made

    def cycles(self, dtype: torch.dtype) -> Cycles:
        """Of the times within the periods, made once."""
        if dtype not in self._cycles:
            assert self.periods is not None
            assert self.batch.q_timestamps is not None
            assert self.batch.k_timestamps is not None
            with torch.inference_mode(False):  # they serve training too
                self._cycles[dtype] = cycles(self.periods, self.batch.q_timestamps, self.batch.k_timestamps, dtype)
        return self._cycles[dtype]

    def q_groups(self) -> Tensor | None:
        """The group of every query, int64 [total_q], made once; None where there are no groups."""
        if self._q_groups is None and self.batch.groups is not None:
            with torch.inference_mode(False):  # as above
                self._q_groups = self.batch.groups[segment_ids(self.batch.q_offsets, self.total_q)]
        return self._q_groups

    def moved(self, move: Callable[[Tensor], Tensor]) -> "AttentionPlan":
        """The plan elsewhere: `move` gives a tensor's copy there, for the same tensor the same copy."""
        plan = copy.copy(self)
        columns = {f.name: getattr(self.batch, f.name) for f in fields(self.batch)}
        tensors: dict[str, Any] = {name: move(x) for name, x in columns.items() if isinstance(x, Tensor)}
        plan.batch = replace(self.batch, **tensors)
        plan.time_thresholds, plan.position_thresholds, plan.periods = (
            None if x is None else move(x) for x in (self.time_thresholds, self.position_thresholds, self.periods)
        )
        plan._prepared = {key: tuple(map(move, made)) for key, made in self._prepared.items()}
        plan._cycles, plan._q_groups = {}, None
        return plan


def make_batch(
    q_offsets: Tensor,
    k_offsets: Tensor | None,
    causal: bool,
    window_size: Window | Sequence[Window | None] | None,
    num_targets: Tensor | None,
    num_contexts: Tensor | None,
    groups: Tensor | None,
) -> Batch:
    """A batch without times, from arguments whose types, shapes and devices are checked here, without reading any."""
    device = q_offsets.device if isinstance(q_offsets, Tensor) else torch.device("cpu")
    check_rows(q_offsets, None, "q_offsets", device)
    k_offsets = q_offsets if k_offsets is None else k_offsets
    check_rows(k_offsets, None, "k_offsets", device)
    size = q_offsets.numel() - 1
    if k_offsets.shape != q_offsets.shape:
        raise ValueError(f"k_offsets: expected as many sequences as q_offsets, {size}, got {k_offsets.numel() - 1}")
    for x, name in ((num_targets, "num_targets"), (num_contexts, "num_contexts"), (groups, "groups")):
        if x is not None:
            _check_per_sequence(x, size, name, device)
    columns = [num_contexts, num_targets]
    if not causal and window_size is None and num_contexts is None and num_targets is None:
        rules = None
    else:
        none = torch.zeros(size, dtype=torch.int64, device=device)
        windows = _windows(window_size, causal, groups, none)
        rules = torch.stack([*windows, *(none if x is None else x for x in columns)], dim=1)
    return Batch(q_offsets, k_offsets, None, None, rules, groups)


def check_rows(x: Tensor, total: int | None, name: str, device: torch.device) -> None:
    """What can be checked of offsets (total None) and timestamps without reading them; `check_values` reads them."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if total is None and (x.dim() != 1 or x.shape[0] < 1):
        raise ValueError(f"{name}: expected shape [batch + 1], got {list(x.shape)}")
    if total is not None and x.shape != (total,):
        raise ValueError(f"{name}: expected shape [{total}], one a row, got {list(x.shape)}")
    if x.dtype != torch.int64 and (total is not None or x.dtype != torch.int32):
        expected = "int32 or int64" if total is None else "int64 unix seconds"
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}; move it there")


def _check_per_sequence(x: Tensor, size: int, name: str, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.shape != (size,):
        found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected int64 [{size}], one a sequence, got {found}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}; move it there")


def _windows(
    window_size: Window | Sequence[Window | None] | None, causal: bool, groups: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """How far each sequence's queries see to the left and to the right, int64 [batch] each."""
    listed = listed_windows(window_size)
    if listed is None:
        assert window_size is None or isinstance(window_size, int | tuple)
        limits = [_window(window_size, causal)]
    elif groups is None:
        raise ValueError(f"window_size: a list has one window a group, and there are no groups; got {window_size}")
    else:
        limits = [_window(window, causal) for window in listed]
    left, right = (torch.tensor(side, dtype=torch.int64, device=like.device) for side in zip(*limits))
    if len(limits) == 1:
        return left.expand_as(like), right.expand_as(like)
    assert groups is not None
    known = groups.clamp(0, len(limits) - 1)  # groups beyond the tables are refused where values are read
    return left[known], right[known]


def listed_windows(window_size: Window | Sequence[Window | None] | None) -> Sequence[Window | None] | None:
    """The windows of the groups; None where there is one window, or none, for all sequences."""
    return None if window_size is None or isinstance(window_size, int | tuple) else window_size


def _window(window: Window | None, causal: bool) -> tuple[int, int]:
    left, right = (-1, -1) if window is None else (window, window) if isinstance(window, int) else window
    if left < -1 or right < -1:
        raise ValueError(f"window_size: expected numbers of positions >= 0, or -1 for no limit, got {window}")
    left, right = (UNLIMITED if side < 0 else min(side, UNLIMITED) for side in (left, right))
    return left, 0 if causal else right


def check_values(
    batch: Batch,
    total_q: int,
    total_k: int,
    time_thresholds: Tensor | None,
    position_thresholds: Tensor | None,
) -> None:
    """Raise ValueError unless every value that a kernel reads memory by, or searches with, is in range."""
    device = batch.q_offsets.device
    check_offsets(batch.q_offsets, total_q, "q_offsets", device)
    check_offsets(batch.k_offsets, total_k, "k_offsets", device)
    if batch.q_timestamps is not None and batch.k_timestamps is not None:
        check_timestamps(batch.q_timestamps, batch.q_offsets, total_q, "q_timestamps")
        _check_range(batch.q_timestamps, "q_timestamps")
        if batch.k_timestamps is not batch.q_timestamps or batch.k_offsets is not batch.q_offsets:
            check_timestamps(batch.k_timestamps, batch.k_offsets, total_k, "k_timestamps")
            _check_range(batch.k_timestamps, "k_timestamps")
    for thresholds, name in ((time_thresholds, "time_bias"), (position_thresholds, "position_bias")):
        if thresholds is not None and bool((thresholds[1:] <= thresholds[:-1]).any()):
            raise ValueError(f"{name}.thresholds: expected increasing integers, got {thresholds.tolist()}")
    if batch.rules is not None:
        _check_rules(batch.rules, batch.k_offsets)


def _check_range(timestamps: Tensor, name: str) -> None:
    """Differences of times must fit int64."""
    if timestamps.numel() and max(abs(int(edge)) for edge in torch.stack(torch.aminmax(timestamps)).tolist()) >= 2**62:
        raise ValueError(f"{name}: expected unix seconds, |t| < 2**62, so that differences fit int64")


def _check_rules(rules: Tensor, k_offsets: Tensor) -> None:
    contexts, targets = rules[:, 2], rules[:, 3]
    wrong = (rules < 0).any(1) | (rules[:, :2] > UNLIMITED).any(1)
    wrong |= (contexts > UNLIMITED) | (targets > UNLIMITED) | (contexts + targets > k_offsets.diff())
    if bool(wrong.any()):
        sequence = int(wrong.nonzero()[0])
        raise ValueError(
            "num_contexts, num_targets: expected numbers >= 0 that fit into their sequence together, got "
            f"{int(contexts[sequence])} and {int(targets[sequence])} for sequence {sequence}, which has "
            f"{int(k_offsets[sequence + 1] - k_offsets[sequence])} keys"
        )


def check_groups(groups: Tensor, num_groups: int) -> None:
    """Raise ValueError unless every group has a table."""
    if groups.numel():
        least, most = torch.stack(torch.aminmax(groups)).tolist()
        if least < 0 or most >= num_groups:
            raise ValueError(
                f"groups: expected 0 to {num_groups - 1}, for tables of {num_groups} groups, got {least} to {most}"
            )

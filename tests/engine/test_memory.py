"""Freed memory stays with a refresh, and goes back to the system when it ends."""

import ctypes
from pathlib import Path

import pytest
import torch
from support.memory import resident
from support.refresh import jagged_log, save_model

from alure.engine.config import RefreshConfig
from alure.engine.refresh import RefreshJob, shard
from alure.engine.refresh.memory import freed_memory_kept

SIZE = 96 << 20  # beyond what glibc keeps by itself
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")


def kept() -> int:
    """Bytes that stay after a tensor of SIZE was written and freed."""
    ctypes.CDLL(None).malloc_trim(0)  # else it may take what an earlier test freed
    before = resident("VmRSS")
    torch.empty(SIZE, dtype=torch.int8).fill_(1)
    return resident("VmRSS") - before


@pytest.mark.parametrize("fails", [False, True])
def test_freed_memory_is_kept_inside_and_given_back_after(fails: bool) -> None:
    for _ in range(2):
        before = resident("VmRSS")
        try:
            with freed_memory_kept():
                assert kept() > SIZE // 2
                if fails:
                    raise InterruptedError
        except InterruptedError:
            assert fails
        assert resident("VmRSS") - before < SIZE // 2


def test_a_refresh_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    write = shard.write_unit

    def watched(*arguments: object) -> None:
        found.append(kept())
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "write_unit", watched)
    log = jagged_log(tmp_path / "log")
    before = resident("VmRSS")
    RefreshJob(save_model(tmp_path / "model", log), log, tmp_path / "store", config=RefreshConfig()).run()
    assert len(found) == 1
    assert found[0] > SIZE // 2
    assert resident("VmRSS") - before < found[0]

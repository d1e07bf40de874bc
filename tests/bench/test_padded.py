"""The padded model that the refresh races against is the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alure.bench.padded import PaddedUserModel
from alure.bench.refresh import Embedding, alike


@pytest.mark.parametrize("by_length", [False, True])
def test_padded_pytorch_computes_the_same_embeddings(tmp_path: Path, by_length: bool) -> None:
    case = Embedding(tmp_path / "case", "small", 20, torch.device("cpu"))
    expected, padded = case.ours("float32")(), case.padded(torch.float32, by_length)
    assert not alike(expected, 1 - 1e-6)(padded())


def test_what_it_makes_is_where_its_batch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, what is made without naming a device is elsewhere."""
    case = Embedding(tmp_path / "case", "small", 20, torch.device("cpu"))
    call = PaddedUserModel.__call__

    def elsewhere(model: PaddedUserModel, *arguments: Any) -> torch.Tensor:
        with torch.device("meta"):
            return call(model, *arguments)

    monkeypatch.setattr(PaddedUserModel, "__call__", elsewhere)
    assert case.padded(torch.float32, by_length=True)().any()

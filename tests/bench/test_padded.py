"""The padded model that the refresh races against is the same model."""

from pathlib import Path

import pytest
import torch

from alure.bench.refresh import Embedding, alike


@pytest.mark.parametrize("by_length", [False, True])
def test_padded_pytorch_computes_the_same_embeddings(tmp_path: Path, by_length: bool) -> None:
    case = Embedding(tmp_path / "case", "small", 20, torch.device("cpu"))
    assert not alike(case.ours("float32")(), 1 - 1e-6)(case.padded(torch.float32, by_length)())

"""Orthogonal Procrustes, and checkpoints turned onto another's space: what moves, and what must not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import CommandLine
from support.model import DAY, START, planted_log, tiny_model
from support.refresh import jagged_log, save_model

from alure.engine.config import RefreshConfig, TrainingConfig
from alure.engine.errors import InputError, Interrupted
from alure.engine.events import Events
from alure.engine.model import AlureModel, EventSchema, UserModel, model_digest, model_space
from alure.engine.model.alignment import procrustes, turn
from alure.engine.model.checkpoint import (
    METRICS,
    CheckpointConfig,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from alure.engine.model.towers import Exposures, two_tower_scores
from alure.engine.refresh import RefreshJob
from alure.engine.refresh.align import AlignReport, align
from alure.engine.store import EmbeddingStore
from alure.engine.training import train

LATE = START + 20 * DAY
seeds = st.integers(0, 2**32 - 1)


def orthogonal(k: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """float64 [k, d, d]; every other one is a reflection."""
    q, _ = torch.linalg.qr(torch.randn(k, d, d, generator=generator, dtype=torch.float64))
    q[::2, :, 0] *= -torch.sign(torch.linalg.det(q[::2]))[:, None]
    return q


def units(n: int, k: int, d: int, generator: torch.Generator, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(n, k, rank or d, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(rank, d, generator=generator, dtype=torch.float64) if rank else x
    return torch.nn.functional.normalize(x, dim=-1)


@given(seeds, st.integers(1, 40), st.integers(1, 3), st.integers(1, 12))
def test_matrices_are_orthogonal_and_bring_no_pair_farther_apart(seed: int, n: int, k: int, d: int) -> None:
    """Also where the users are fewer than the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    new, old = units(n, k, d, generator), units(n, k, d, generator)
    found = procrustes(new, old)
    assert (found.mT @ found - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-10
    assert torch.equal(found, procrustes(new, old))
    products = (turn(new, found) * old).sum((0, 2))
    for other in (torch.eye(d, dtype=torch.float64).expand(k, d, d), orthogonal(k, d, generator)):
        assert (products >= (turn(new, other) * old).sum((0, 2)) - 1e-9).all()
    turned = turn(new, found)
    torch.testing.assert_close(
        torch.einsum("akd,bkd->abk", turned, turned), torch.einsum("akd,bkd->abk", new, new), atol=1e-12, rtol=0
    )


@given(seeds, st.integers(1, 3), st.integers(2, 12))
def test_planted_matrices_are_found(seed: int, k: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, planted = units(4 * d, k, d, generator), orthogonal(k, d, generator)
    torch.testing.assert_close(procrustes(turn(old, planted.mT), old), planted, atol=1e-8, rtol=0)


@given(seeds, st.integers(1, 3))
def test_of_few_directions_those_are_turned_onto_each_other(seed: int, rank: int) -> None:
    """All users lie in a subspace: the rest of the matrix is free, and it is orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    old, planted = units(30, 2, 8, generator, rank), orthogonal(2, 8, generator)
    new = turn(old, planted.mT)
    found = procrustes(new, old)
    assert (found.mT @ found - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-10
    torch.testing.assert_close(turn(new, found), old, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (torch.ones(3, 2, 4), torch.ones(3, 2, 5)),
        (torch.ones(3, 8), torch.ones(3, 8)),
        (torch.ones(0, 2, 4), torch.ones(0, 2, 4)),
        (torch.full((3, 2, 4), float("nan")), torch.ones(3, 2, 4)),
    ],
)
def test_what_does_not_compare_is_refused(new: torch.Tensor, old: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        procrustes(new, old)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, two models of other seeds, and `turned`: the first with planted matrices behind its embeddings."""
    folder = tmp_path_factory.mktemp("alignment")
    events = jagged_log(folder / "events")
    for name, seed in (("first", 0), ("second", 1)):
        save_model(folder / name, events, seed)
    plant(folder / "first", folder / "turned", 5)
    return folder


def plant(model: Path, out: Path, seed: int) -> Path:
    config, tensors = read_checkpoint(model)
    rotations = orthogonal(2, 16, torch.Generator().manual_seed(seed)).float()
    write_checkpoint(out, {**tensors, "user.rotations": rotations}, config, {"loss": 1.0})
    return out


def aligned(world: Path, model: str, to: str, out: Path, **options: Any) -> AlignReport:
    return align(world / model, world / to, Events.open(world / "events"), out, **options)


def embeddings(model: Path, events: Events) -> torch.Tensor:
    found = UserModel.load(model)
    return found(events.batch(range(60), LATE), found.catalog(events))


def test_a_turned_model_comes_back_to_where_it_was(world: Path, tmp_path: Path) -> None:
    events = Events.open(world / "events")
    before, turned = (embeddings(world / name, events) for name in ("first", "turned"))
    assert (before - turned).abs().max() > 0.1
    report = aligned(world, "turned", "first", tmp_path)
    assert (report.users, report.held_out) == (46, 12)
    assert abs(report.mean_cosine_before) < 0.5
    assert report.mean_cosine > 1 - 1e-6
    back = embeddings(tmp_path, events)
    torch.testing.assert_close(back, before, atol=2e-5, rtol=0)
    assert model_space(tmp_path) == report.space == model_digest(world / "first")
    assert model_digest(tmp_path) not in (model_digest(world / "first"), model_digest(world / "turned"))


def test_cosines_scores_and_logits_stay_as_they_are(world: Path, tmp_path: Path) -> None:
    events = Events.open(world / "events")
    torch.manual_seed(7)
    model = AlureModel(tiny_model(), EventSchema.of(events.manifest), ("ctr", "cvr"))
    config = CheckpointConfig(model=model.config, events=model.schema, tasks=model.tasks, sha256="")
    save_checkpoint(tmp_path / "model", model, config, {"loss": 2.0})
    report = align(tmp_path / "model", world / "first", events, tmp_path / "aligned")
    assert report.mean_cosine > report.mean_cosine_before
    batch, items = events.batch(range(60), LATE), torch.arange(40)
    users = torch.arange(60)
    exposures = Exposures(users % 40, torch.arange(61), users, batch.as_of)
    found = []
    for name in ("model", "aligned"):
        loaded = AlureModel.load(tmp_path / name)
        catalog = loaded.user.catalog(events)
        state = loaded(batch, catalog)
        scores = two_tower_scores(state.embeddings, loaded.embed_ads(items, catalog))
        cosines = torch.einsum("akd,bkd->abk", state.embeddings, state.embeddings)
        found.append((state.embeddings, cosines, scores, loaded.rank(state, exposures, catalog)))
    before, after = found
    assert (before[0] - after[0]).abs().max() > 0.1
    for then, now in zip(before[1:], after[1:]):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)
    assert '"loss": 2.0' in (tmp_path / "aligned" / METRICS).read_text()


def test_matrices_follow_one_another(world: Path, tmp_path: Path) -> None:
    """Turned, aligned to the second, and from there to the first: the first's own embeddings again."""
    aligned(world, "turned", "second", tmp_path / "a")
    align(tmp_path / "a", world / "first", Events.open(world / "events"), tmp_path / "b")
    events = Events.open(world / "events")
    torch.testing.assert_close(
        embeddings(tmp_path / "b", events), embeddings(world / "first", events), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_precision_and_type_is_turned(world: Path, tmp_path: Path, dtype: str, precision: str) -> None:
    config = RefreshConfig.model_validate({"output_dtype": dtype, "precision": precision})
    values = {}
    for name in ("first", "turned"):
        RefreshJob(world / name, world / "events", tmp_path / name, config=config).run()
        values[name] = EmbeddingStore(tmp_path / name).read_matrix().values.reshape(-1, 2, 16)
    rotations = read_checkpoint(world / "turned")[1]["user.rotations"].numpy()
    expected = np.einsum("bki,kij->bkj", values["first"], rotations)
    off = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}[dtype]
    np.testing.assert_allclose(values["turned"], expected, atol=off)
    half = UserModel.load(world / "turned").to(torch.bfloat16)
    assert torch.equal(half.rotations, torch.from_numpy(rotations))


def test_training_goes_on_from_an_aligned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices stay as they are, the first loss is that of the model before, and a stopped training goes on."""
    events = planted_log(tmp_path / "events", num_users=40)
    quick = {"steps": 6, "batch_users": 16, "negatives": 8, "max_events": 6, "threads": 1, "validate_every": 2}
    config = TrainingConfig.model_validate(quick)

    def run(out: str, start: str | None = None) -> Any:
        return train(events, tiny_model(), config, tmp_path / out, warm_start=start and tmp_path / start)

    run("model")
    plant(tmp_path / "model", tmp_path / "turned", 2)
    plain, turned = run("plain", "model"), run("went on", "turned")
    assert turned.validations[0]["recall@10"] == plain.validations[0]["recall@10"]
    assert [point["loss"] for point in turned.curve] == pytest.approx([p["loss"] for p in plain.curve], rel=1e-3)
    first, last = (read_checkpoint(tmp_path / name)[1]["user.rotations"] for name in ("turned", "went on"))
    assert torch.equal(first, last)
    assert model_space(tmp_path / "went on") == model_digest(tmp_path / "went on")

    with monkeypatch.context() as patch:
        patch.setattr("alure.engine.training.loop.Loop._validate", lambda self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run("again", "turned")
    run("again", "turned")
    assert model_digest(tmp_path / "again") == model_digest(tmp_path / "went on")


def test_models_and_logs_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    events = Events.open(world / "events")
    save_model(tmp_path / "one", events, num_embeddings=1)
    with pytest.raises(InputError, match=r"has 1 embeddings of width 16, .* has 2 of width 16"):
        align(tmp_path / "one", world / "first", events, tmp_path / "out")
    with pytest.raises(InputError, match="0 users have an event up to as_of"):
        aligned(world, "second", "first", tmp_path / "out", as_of=START - 1)
    with pytest.raises(InputError, match="is one of the two models"):
        aligned(world, "second", "first", world / "second")
    assert not (tmp_path / "out").exists()


def test_the_command(world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alure = CommandLine(capfd, monkeypatch)
    words = ("align", world / "second", world / "events", "--to", world / "first", "--out", tmp_path)
    outcome = alure(*words, "--anchors", 10, "--json")
    assert (outcome.code, outcome.json["users"], outcome.json["held_out"]) == (0, 8, 2)
    assert "8 users for a space of 16 dimensions" in outcome.err
    assert alure("inspect", tmp_path, "--json").json["metrics"]["alignment"]["users"] == 8
    assert alure(*words[:-1], world / "first").code == 2

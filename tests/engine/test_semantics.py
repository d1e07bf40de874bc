"""Semantic ids: codebooks that are used evenly, the same by the same seed; items that get their codes or nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import write_deltalake
from support.command_line import CommandLine
from support.ingest import LATEST
from support.model import tiny_model

from alure.engine.config import EventsConfig, SemanticsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events, ingest
from alure.engine.model import AlureModel, EventSchema
from alure.engine.semantics import Quantizer, QuantizerShape, encode_items, load_quantizer, train_quantizer
from alure.engine.semantics.codebooks import DESCRIPTION
from alure.engine.semantics.figures import distinctness, fingerprints, perplexities
from alure.engine.semantics.rqvae import compute_losses
from alure.engine.semantics.training import default_codebook
from alure.kernels import residual_quantize

WIDTH = 24
KMEANS = SemanticsConfig(method="kmeans", codebook=16)
RQVAE = SemanticsConfig(method="rqvae", codebook=16, hidden=(32,), latent=8, steps=200, batch_size=128)
METHODS = pytest.mark.parametrize("config", [KMEANS, RQVAE], ids=["kmeans", "rqvae"])


@pytest.fixture
def alure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capfd, monkeypatch)


def curved_vectors(n: int, seed: int = 0) -> np.ndarray:
    """float32 [n, WIDTH] near a curved surface of 5 dimensions, far from the origin."""
    rng = np.random.default_rng(7)
    inner, outer = rng.standard_normal((5, 40)), rng.standard_normal((40, WIDTH))
    rng = np.random.default_rng(seed)
    surface = np.tanh(rng.standard_normal((n, 5)) @ inner) @ outer
    return (surface + 0.1 * rng.standard_normal((n, WIDTH)) + 20).astype(np.float32)


def write_items(path: Path, vectors: Any, **columns: Any) -> Path:
    """item_id 100, 101, …; vectors: an array [n, width], or a list with None and odd lengths."""
    lists = pa.array(list(vectors), pa.list_(pa.float32()))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"item_id": np.arange(100, 100 + len(lists)), **columns, "dense": lists})
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items") / "items.parquet", curved_vectors(1_500))


@pytest.fixture(scope="module")
def codebooks(items: Path) -> Path:
    train_quantizer(items, KMEANS, items.parent / "codebooks", seed=1)
    return items.parent / "codebooks"


# ---------------------------------------------------------------- training


@METHODS
def test_held_out_vectors_use_every_level_and_keep_their_content(
    items: Path, tmp_path: Path, config: SemanticsConfig
) -> None:
    report = train_quantizer(items, config, tmp_path / "codebooks", seed=1)
    assert (report.vectors, report.held_out, report.width) == (1_350, 150, WIDTH)
    assert report.held_out_use >= 0.8
    assert report.held_out_use == min(report.held_out_perplexity) / 16
    assert report.explained > 0.75
    # the report's figures, anew from the files
    quantizer, _ = load_quantizer(tmp_path / "codebooks")
    x = torch.from_numpy(curved_vectors(1_500))
    codes = quantizer.codes(x)
    assert report.unique_share == len(codes.unique(dim=0)) / 1_500
    kept = 1 - (x - quantizer.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(kept) == pytest.approx(report.explained, abs=0.03)


@METHODS
def test_the_same_seed_gives_the_same_codebooks(items: Path, tmp_path: Path, config: SemanticsConfig) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        train_quantizer(items, config, tmp_path / name, seed=seed)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    digests = [load_quantizer(tmp_path / name)[1] for name in ("first", "again", "other")]
    assert digests[0] == digests[1] != digests[2]
    assert first.held_out_perplexity == again.held_out_perplexity != other.held_out_perplexity
    assert torch.equal(state, torch.get_rng_state())


def test_rare_codes_are_what_the_reset_is_for(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that still spread when the codes start leave codes behind; without the reset they stay there."""
    from alure.engine.semantics import rqvae

    config = RQVAE.model_copy(update={"learning_rate": 1e-3, "steps": 120})
    with_resets = train_quantizer(items, config, tmp_path / "with")
    monkeypatch.setattr(rqvae, "reseat", lambda *_: None)
    without = train_quantizer(items, config, tmp_path / "without")
    assert with_resets.held_out_use > without.held_out_use + 0.1
    assert with_resets.explained > without.explained


def test_the_losses_and_where_their_gradients_go() -> None:
    """Against the formulas, in float64: commitment moves the encoder only, the codebook loss the codebooks only."""
    shape = QuantizerShape(method="rqvae", width=6, levels=3, codebook=5, hidden=(7,), latent=4)
    quantizer = Quantizer(shape).double()
    torch.nn.init.normal_(quantizer.codebooks)
    x = torch.randn(9, 6, dtype=torch.float64)
    losses = compute_losses(quantizer, x)

    z = quantizer.encoder(x)
    codes, _ = residual_quantize(z.detach(), quantizer.codebooks.detach())
    chosen = torch.stack([quantizer.codebooks[level, codes[:, level]] for level in range(3)])
    left = z - torch.cat([torch.zeros(1, 9, 4), chosen[:-1].detach()]).cumsum(0)  # [levels, 9, 4]
    codebook = (left.detach() - chosen).square().sum((0, 2)).mean()
    commitment = (left - chosen.detach()).square().sum((0, 2)).mean()
    decoded = quantizer.decoder(chosen.sum(0).detach())
    for got, want in zip(losses, ((x - decoded).square().sum(1).mean(), codebook, commitment)):
        torch.testing.assert_close(got, want)
    for got, want in ((losses.codebook, codebook), (losses.commitment, commitment)):
        parts = (quantizer.codebooks, quantizer.encoder[0].weight)  # type: ignore[index]
        found = torch.autograd.grad(got, parts, retain_graph=True, allow_unused=True, materialize_grads=True)
        expected = torch.autograd.grad(want, parts, retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, expected)
    # straight through: what reaches the encoder from the reconstruction is the gradient at the codes' sum
    at = chosen.sum(0).detach().requires_grad_()
    (slope,) = torch.autograd.grad((x - quantizer.decoder(at)).square().sum(1).mean(), at)
    weight = quantizer.encoder[0].weight  # type: ignore[index]
    (wanted,) = torch.autograd.grad(z, weight, slope, retain_graph=True)
    (found_weight,) = torch.autograd.grad(losses.reconstruction, weight)
    torch.testing.assert_close(found_weight, wanted)


def test_the_network_follows_a_curve_that_kmeans_cannot(tmp_path: Path) -> None:
    """A circle: 4 codes explain little of it in the plane; one dimension of latents is enough for the network."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi * 0.9, 2_000)
    turns = np.arange(1, 9)
    circle = np.concatenate([np.cos(np.outer(angle, turns)), np.sin(np.outer(angle, turns))], axis=1)
    path = write_items(tmp_path / "items.parquet", circle)
    sizes: dict[str, Any] = {"levels": 2, "codebook": 8}
    kmeans = train_quantizer(path, SemanticsConfig(method="kmeans", **sizes), tmp_path / "kmeans")
    network = SemanticsConfig(method="rqvae", hidden=(64, 32), latent=4, steps=300, **sizes)
    assert train_quantizer(path, network, tmp_path / "rqvae").explained > kmeans.explained + 0.05


def test_the_default_codebook_follows_the_number_of_items() -> None:
    sizes = [default_codebook(n) for n in (0, 10, 400, 1_500, 4_097, 12_287, 12_288, 10**7)]
    assert sizes == [8, 8, 8, 16, 64, 128, 256, 256]


def test_only_a_sample_of_a_large_table_is_learned_from(items: Path, tmp_path: Path) -> None:
    config = KMEANS.model_copy(update={"max_vectors": 400})
    report = train_quantizer(items, config, tmp_path / "a")
    assert (report.vectors, report.held_out, report.skipped.items) == (360, 40, 400)
    train_quantizer(items, config, tmp_path / "b")
    assert load_quantizer(tmp_path / "a")[1] == load_quantizer(tmp_path / "b")[1]


def test_items_that_are_all_alike(tmp_path: Path) -> None:
    """No variance: one code a level, nothing divided by zero."""
    path = write_items(tmp_path / "items.parquet", np.full((40, 3), 2.5))
    for config in (SemanticsConfig(method="kmeans"), SemanticsConfig(method="rqvae", steps=20, latent=2)):
        report = train_quantizer(path, config, tmp_path / config.method)
        assert report.perplexity == pytest.approx([1, 1, 1])
        assert (report.explained, report.collision_rate) == (1.0, 0.0)
        assert report.unique_share == 1 / 40


def test_huge_and_tiny_vectors_are_scaled(tmp_path: Path) -> None:
    vectors = curved_vectors(600) - 20
    for factor in (1e-15, 1e15):
        path = write_items(tmp_path / "items.parquet", vectors * np.float32(factor))
        assert train_quantizer(path, RQVAE.model_copy(update={"steps": 100}), tmp_path / "codebooks").explained > 0.5


# ---------------------------------------------------------------- figures


def test_perplexity_and_collisions_of_known_codes() -> None:
    codes = np.array([[0, 1], [0, 1], [0, 2], [3, 0], [0, 1]], np.int32)
    vectors = np.array([[1, 0], [1, -0.0], [2, 0], [3, 0], [4, 0]], np.float32)
    even, uneven = perplexities(np.array([[0, 0], [1, 0], [2, 0], [3, 0]], np.int32), 4)
    assert (even, uneven) == pytest.approx((4, 1))
    told = distinctness(codes, fingerprints(vectors))
    assert told["unique_share"] == 3 / 5
    assert told["collision_rate"] == 2 / 4  # of four different vectors, [1, 0] and [4, 0] share (0, 1)
    assert distinctness(codes[:0], fingerprints(vectors[:0])) == {"unique_share": 0.0, "collision_rate": 0.0}


def test_fingerprints_differ_where_vectors_do() -> None:
    vectors = np.random.default_rng(0).integers(0, 3, (20_000, 9)).astype(np.float32)
    assert len(np.unique(fingerprints(vectors))) == len(np.unique(vectors, axis=0))


# ---------------------------------------------------------------- encoding


def test_every_other_column_and_row_is_kept(items: Path, codebooks: Path, tmp_path: Path) -> None:
    table = pq.read_table(items).slice(0, 5)
    vectors = table["dense"].to_pylist()
    rows = [vectors[0], None, vectors[2], [], vectors[4]]
    extra = {"title": ["a", None, "c", "d", "e"], "when": pa.array([1, 2, 3, None, 5], pa.timestamp("us"))}
    given = write_items(tmp_path / "items.parquet", rows, **extra)
    report = encode_items(codebooks, given, tmp_path / "out" / "coded.parquet")
    before, after = pq.read_table(given), pq.read_table(tmp_path / "out" / "coded.parquet")
    assert after.schema.names == [*before.schema.names, "semantic_ids"]
    assert after.drop_columns("semantic_ids").equals(before)
    quantizer, digest = load_quantizer(codebooks)
    expected: list[Any] = quantizer.codes(torch.tensor([vectors[0], vectors[2], vectors[4]])).tolist()
    assert after["semantic_ids"].to_pylist() == [expected[0], None, expected[1], None, expected[2]]
    assert after.schema.metadata[b"alure.codebooks"].decode() == digest
    assert (report.rows.items, report.rows.usable, report.rows.without) == (5, 3, 2)
    assert report.perplexity == perplexities(np.array(expected, np.int32), report.codebook)
    assert report.unique_share == len(np.unique(expected, axis=0)) / 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coded.parquet"]


def test_encoding_again_in_place_changes_nothing(items: Path, codebooks: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded.parquet"
    first = encode_items(codebooks, items, coded)
    before = pq.read_table(coded)
    again = encode_items(codebooks, coded, coded)
    assert (first.replaced, again.replaced) == (False, True)
    assert pq.read_table(coded).equals(before)


@pytest.mark.parametrize("kind", ["folder", "delta", "fixed size", "float64", "integers"])
def test_tables_of_every_kind(items: Path, codebooks: Path, tmp_path: Path, kind: str) -> None:
    table = pq.read_table(items)
    expected = encode_items(codebooks, items, tmp_path / "expected.parquet")
    path = tmp_path / "given"
    if kind == "folder":
        path.mkdir()
        pq.write_table(table.slice(0, 700), path / "a.parquet")
        pq.write_table(table.slice(700).append_column("title", pa.array(["t"] * 800)), path / "b.parquet")
    elif kind == "delta":
        write_deltalake(path, table)
    else:
        types = {
            "fixed size": pa.list_(pa.float32(), WIDTH),
            "float64": pa.large_list(pa.float64()),
            "integers": pa.list_(pa.int16()),
        }
        values = table["dense"].combine_chunks().cast(types[kind], safe=False)
        pq.write_table(table.set_column(1, "dense", values), path)
    report = encode_items(codebooks, path, tmp_path / "out.parquet")
    coded = pq.read_table(tmp_path / "out.parquet").sort_by("item_id")
    assert report.rows.usable == 1_500
    if kind == "folder":
        assert coded["title"].to_pylist() == [None] * 700 + ["t"] * 800
    if kind != "integers":
        assert coded["semantic_ids"].equals(pq.read_table(tmp_path / "expected.parquet")["semantic_ids"])
        assert report.perplexity == expected.perplexity


def test_a_few_bad_vectors_get_no_codes_many_stop_the_job(items: Path, codebooks: Path, tmp_path: Path) -> None:
    vectors: list[Any] = list(curved_vectors(100))
    vectors[3][2] = np.nan
    vectors[50][0] = np.inf
    vectors[70] = vectors[70][:5]
    few = write_items(tmp_path / "few.parquet", vectors)
    report = encode_items(codebooks, few, tmp_path / "coded.parquet")
    assert (report.rows.not_finite, report.rows.wrong_length, report.rows.usable) == (2, 1, 97)
    codes = pq.read_table(tmp_path / "coded.parquet")["semantic_ids"].to_pylist()
    assert [row for row, code in enumerate(codes) if code is None] == [3, 50, 70]
    assert train_quantizer(few, KMEANS, tmp_path / "codebooks").skipped == report.rows
    for row in range(10, 20):
        vectors[row] = np.full(WIDTH, np.nan)
    many = write_items(tmp_path / "many.parquet", vectors)
    before = (tmp_path / "coded.parquet").read_bytes()
    with pytest.raises(InputError, match="1 have another length than 24 and 12 hold NaN"):
        encode_items(codebooks, many, tmp_path / "coded.parquet")
    assert (tmp_path / "coded.parquet").read_bytes() == before
    with pytest.raises(InputError, match="12 hold NaN"):
        train_quantizer(many, KMEANS, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_codes_reach_the_model(items: Path, codebooks: Path, tmp_path: Path) -> None:
    """Items → codes → ingest → the rows of the model's table: same codes, same rows; and they change an embedding."""
    coded = tmp_path / "coded.parquet"
    encode_items(codebooks, items, coded)
    rng = np.random.default_rng(0)
    log = pa.table(
        {
            "user_id": np.repeat(np.arange(30), 8),
            "timestamp": rng.integers(1_700_000_000, 1_700_500_000, 240),
            "item_id": np.append(rng.integers(100, 1_600, 239), 99_999),  # the last is not among the items
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    config = EventsConfig(inputs=[tmp_path / "log.parquet"], items=coded, latest=LATEST)
    ingest(config, tmp_path / "events")
    events = Events.open(tmp_path / "events")
    assert (events.manifest.semantic_levels, events.manifest.semantic_codes) == (3, 16)
    table = pq.read_table(coded)
    by_id = dict(zip(table["item_id"].to_pylist(), table["semantic_ids"].to_pylist()))
    ids = events.items.item_ids.to_pylist()
    assert events.items.semantic_ids is not None
    assert events.items.semantic_ids.tolist() == [by_id.get(item, [-1, -1, -1]) for item in ids]

    torch.manual_seed(0)
    model = AlureModel(tiny_model(), EventSchema.of(events.manifest), ()).requires_grad_(False)
    catalog = model.user.catalog(events)
    assert catalog.schema.item_attributes[-3:] == ("semantic_0", "semantic_1", "semantic_2")
    rows = catalog.item_rows(torch.arange(len(ids)))[:, -3:]
    assert (rows[ids.index(99_999)] == -1).all()
    known = [index for index, item in enumerate(ids) if item in by_id]
    for level in range(3):  # one row a code
        pairs = {(by_id[ids[index]][level], int(rows[index, level])) for index in known}
        assert len(pairs) == len({code for code, _ in pairs}) == len({row for _, row in pairs}) == 16
    source = events.manifest.sources[0]
    seen = events.batch(range(30), events.manifest.last_timestamp)
    embedded = model.user(seen, catalog)
    assert catalog.item_codes is not None
    catalog.item_codes.copy_(catalog.item_codes.flip(0))
    assert not torch.equal(model.user(seen, catalog), embedded), source


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"item_id": [1]}, "expected a column dense with the content vectors, got item_id"),
        ({"dence": [[1.0]]}, "nearest is 'dence'"),
        ({"dense": [1.0]}, "expected lists of floats, got double"),
        ({"dense": [["a"]]}, "expected lists of floats, got list"),
        ({"dense": pa.array([None, []], pa.list_(pa.float32()))}, "only nulls and empty lists"),
        ({"dense": [[1.0, 2.0]] * 9 + [[1.0]]}, "of 10 vectors, 1 have another length than 2"),
        ({"dense": [[1.0, None]] * 2}, "of 2 vectors, 0 have another length than 2 and 2 hold NaN"),
        ({"dense": [[1.0, 2.0]] * 8}, r"at least 16 vectors to learn from, one a code, got 7 \(and 1 held out\)"),
    ],
)
def test_tables_that_cannot_be_learned_from(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    with pytest.raises(InputError, match=message):
        train_quantizer(tmp_path / "items.parquet", KMEANS, tmp_path / "codebooks")
    assert not (tmp_path / "codebooks").exists()


def test_files_that_are_not_there_or_not_whole(items: Path, codebooks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        train_quantizer(tmp_path / "nowhere.parquet", KMEANS, tmp_path / "out")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(items.read_bytes()[:-500])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        encode_items(codebooks, cut, tmp_path / "out.parquet")
    middle = bytearray(items.read_bytes())
    middle[5_000:60_000] = bytes(55_000)
    cut.write_bytes(bytes(middle))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        encode_items(codebooks, cut, tmp_path / "out.parquet")
    assert list(tmp_path.glob("*out*")) == []


def test_places_that_cannot_be_written(items: Path, codebooks: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        train_quantizer(items, KMEANS, tmp_path / "file")
    with pytest.raises(InputError, match="is not empty"):
        train_quantizer(items, KMEANS, tmp_path / "folder")
    with pytest.raises(InputError, match="is a folder; expected the name of a Parquet file"):
        encode_items(codebooks, items, tmp_path / "folder")
    with pytest.raises(InputError, match="cannot be written"):
        encode_items(codebooks, items, tmp_path / "file" / "out.parquet")
    with pytest.raises(InputError, match="is inside"):
        encode_items(codebooks, items.parent, items.parent / "out.parquet")


def test_codebooks_of_another_width_are_refused(codebooks: Path, tmp_path: Path) -> None:
    other = write_items(tmp_path / "items.parquet", np.ones((20, WIDTH + 1)))
    with pytest.raises(InputError, match=f"expected vectors of {WIDTH} values as the codebooks .* got {WIDTH + 1}"):
        encode_items(codebooks, other, tmp_path / "out.parquet")


def tensors_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**data, **changes}))


def other_shape(folder: Path) -> None:
    shape = json.loads((folder / DESCRIPTION).read_text())["shape"]
    edit(folder, shape={**shape, "levels": 4})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: tensors_of(f).write_bytes(tensors_of(f).read_bytes()[:-10]), "was truncated, altered or removed"),
        (lambda f: tensors_of(f).write_bytes(b""), "was truncated, altered or removed"),
        (lambda f: tensors_of(f).unlink(), "got no file"),
        (lambda f: (f / DESCRIPTION).write_text((f / DESCRIPTION).read_text()[:-30]), "is damaged"),
        (lambda f: (f / DESCRIPTION).unlink(), "holds no codebooks.json; make it with"),
        (lambda f: edit(f, format_version=9), "format version 9, expected 1"),
        (lambda f: edit(f, surprise=1), "surprise"),
        (other_shape, r"codebooks: expected torch.float32 \[4, 16, 24\], got torch.float32 \[3, 16, 24\]"),
    ],
)
def test_damaged_codebooks_are_refused(items: Path, codebooks: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "codebooks"
    folder.mkdir()
    for path in codebooks.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(InputError, match=message):
        encode_items(folder, items, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_new_codebooks_take_the_place_of_the_old_whole(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its two files, a training leaves the codebooks that were there."""
    from alure.engine.semantics import codebooks as module

    folder = tmp_path / "codebooks"
    train_quantizer(items, KMEANS, folder, seed=0)
    _, old = load_quantizer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_quantizer(items, KMEANS, folder, seed=1)
    assert load_quantizer(folder)[1] == old
    train_quantizer(items, KMEANS, folder, seed=1)
    assert load_quantizer(folder)[1] != old
    assert len(list(folder.iterdir())) == 2


def test_a_loss_that_is_not_finite_writes_nothing(items: Path, tmp_path: Path) -> None:
    config = RQVAE.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(AlureError, match=r"stopped being finite at step \d+ of 200; nothing was written"):
        train_quantizer(items, config, tmp_path / "codebooks")
    assert not (tmp_path / "codebooks").exists()


KILLED = """
import os, sys
from pathlib import Path
from alure.engine.semantics import encode_items, encoding
seen = 0
whole = encoding.with_codes
def dying(*arguments):
    global seen
    seen += 1
    if seen == 2:
        os.kill(os.getpid(), 9)
    return whole(*arguments)
encoding.with_codes = dying
encode_items(*map(Path, sys.argv[1:]))
"""


def test_killed_while_writing_leaves_what_was_there(codebooks: Path, tmp_path: Path) -> None:
    given = write_items(tmp_path / "items.parquet", curved_vectors(20_000))
    out = tmp_path / "out" / "coded.parquet"
    out.parent.mkdir()
    out.write_text("yesterday's")
    died = subprocess.run([sys.executable, "-P", "-c", KILLED, codebooks, given, out], check=False)
    assert died.returncode == -signal.SIGKILL
    assert out.read_text() == "yesterday's"
    assert encode_items(codebooks, given, out).rows.usable == 20_000
    assert pq.read_metadata(out).num_rows == 20_000
    assert [path.name for path in out.parent.iterdir()] == ["coded.parquet"]  # the dead one's rest is gone


def test_of_two_writers_one_is_told(items: Path, codebooks: Path, tmp_path: Path) -> None:
    from alure.engine.semantics.encoding import whole_file

    out = tmp_path / "coded.parquet"
    with whole_file(out) as file:
        file.write(b"first")
        with pytest.raises(AlureError, match="another process is writing"):
            encode_items(codebooks, items, out)
    assert out.read_bytes() == b"first"


# ---------------------------------------------------------------- the commands


def test_the_commands(alure: CommandLine, items: Path, tmp_path: Path) -> None:
    for command in ("train", "encode"):
        shown = alure("quantize", command, "--help")
        assert shown.code == 0
        assert "Example" in shown.out
        assert "--json" in shown.out
    codebooks, coded = tmp_path / "codebooks", tmp_path / "coded.parquet"
    words = ["--method", "kmeans", "--levels", 2, "--codebook", 8, "--seed", 1, "--json"]
    trained = alure("quantize", "train", items, "--out", codebooks, *words)
    assert trained.code == 0, trained.err
    assert len(trained.json["held_out_perplexity"]) == 2
    encoded = alure("quantize", "encode", codebooks, items, "--out", coded, "--json")
    assert encoded.code == 0, encoded.err
    assert encoded.json["rows"]["usable"] == 1_500
    assert {len(codes) for codes in pq.read_table(coded)["semantic_ids"].to_pylist()} == {2}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--levels", 0], "levels"),
        (["--levels", 17], "levels"),
        (["--codebook", 1], "codebook"),
        (["--codebook", 70_000], "codebook"),
        (["--method", "magic"], "method"),
        (["--hidden", "wide"], "--hidden: expected widths such as 256,128"),
        (["--hidden", "0"], "hidden"),
        (["--beta", -1], "beta"),
        (["--codebook", 2_000], "expected at least 2,000 vectors"),
        (["--dense", "item_id"], "expected lists of floats, got int64"),
    ],
)
def test_bad_options_exit_with_2(
    alure: CommandLine, items: Path, tmp_path: Path, words: list[object], complaint: str
) -> None:
    outcome = alure("quantize", "train", items, "--out", tmp_path / "out", *words, "--json")
    assert outcome.code == 2, outcome.err
    assert complaint in outcome.err
    assert outcome.json["exit_code"] == 2
    assert not (tmp_path / "out").exists()

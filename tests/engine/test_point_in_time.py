"""Planted leaks: later events that give the answer away must not move a bit of what is made for an earlier moment."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.events import make_events
from support.model import DAY, START, LogParts, SourceRows, tiny_model, write_log
from support.refresh import name_countries, rows_of

from alure.engine.config import EvaluationConfig, GraphConfig, RefreshConfig, RetrievalConfig, TrainingConfig
from alure.engine.evaluation import evaluate
from alure.engine.events import Events, Manifest
from alure.engine.graph import build_graphs
from alure.engine.model import UserModel
from alure.engine.model.checkpoint import CheckpointConfig
from alure.engine.refresh import RefreshJob
from alure.engine.retrieval import retrieve
from alure.engine.store import EmbeddingStore
from alure.engine.training import train

USERS, ITEMS, T = 60, 30, START + 20 * DAY
TRAINING: dict[str, Any] = {
    "steps": 3, "batch_users": 24, "negatives": 8, "max_events": 16, "exposures": 2, "threads": 1,
    "validation_share": 0.3,
}  # fmt: skip
VIEW, CLICK = 0, 1


class Log:
    """Rows of three sources: exposures and clicks, which are of ads, and hints, which are read and never asked for."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {"ads": [], "hint": []}  # user, time, item, event type

    def add(self, source: str, user: Any, time: Any, item: Any, kind: int) -> "Log":
        user, time, item = np.broadcast_arrays(user, time, item)
        self.rows[source].append(np.stack([user, time, item, np.full(len(user), kind)]))
        return self

    def write(self, folder: Path) -> Events:
        joined = {name: np.concatenate(parts, axis=1) for name, parts in self.rows.items()}
        sources = {name: SourceRows(*columns) for name, columns in joined.items()}
        index = np.arange(ITEMS)
        parts = LogParts(USERS, ITEMS, sources, ["view", "click"], index // 3, index % 4)
        write_log(folder, parts)
        Manifest.read(folder).model_copy(update={"ad_sources": ["ads"]}).write(folder)
        return name_countries(folder, {"AR": 0.4, "BR": 0.6})


def past(until: int, hints_until: int) -> Log:
    """What users 0 to 54 did up to `until`: each has a taste that shows in views and clicks; hints are noise."""
    generator, log = np.random.default_rng(0), Log()
    user = np.repeat(np.arange(55), 14)
    item = (user % 3) * 10 + generator.integers(0, 10, len(user))
    time = START + generator.integers(0, 20 * DAY, len(user))
    clicked = generator.random(len(user)) < 0.5
    hint, moment = generator.integers(0, ITEMS, len(user)), START + generator.integers(0, 20 * DAY, len(user))
    early, said = time + 60 <= until, moment <= hints_until
    log.add("ads", user[early], time[early], item[early], VIEW)
    log.add("ads", user[early & clicked], time[early & clicked] + 60, item[early & clicked], CLICK)
    return log.add("hint", user[said], moment[said], hint[said], VIEW)


def later(kind: str) -> Log:
    """The same up to T, and after it: nothing; what users do next; or, from the next second on, the answers."""
    log, generator = past(T, T), np.random.default_rng(1)
    if kind == "usual":
        user = np.arange(55)
        log.add("ads", user, T + 2 * DAY, generator.integers(0, ITEMS, 55), CLICK)
    if kind == "leak":
        user = np.repeat(np.arange(USERS), 20)  # 55 to 59 come new
        answer = generator.integers(0, ITEMS, len(user))
        for second in (1, DAY, 30 * DAY):
            log.add("hint", user, T + second, answer, CLICK)
            log.add("ads", user, T + second, answer, VIEW)
            log.add("ads", user, T + second, answer, CLICK)
    return log


def outcome(events: Events, folder: Path, truth: Path) -> dict[str, Any]:
    """Everything that the chain makes for T, as plain values."""
    report = train(events, tiny_model(layers=1), TrainingConfig.model_validate(TRAINING), folder / "model", as_of=T)
    job = RefreshJob(folder / "model", events, folder / "store", as_of=T, config=RefreshConfig(precision="float32"))
    job.run()
    store = EmbeddingStore(folder / "store")
    build_graphs(store, GraphConfig(k=5))
    retrieve(store, events, RetrievalConfig(exclude_seen=True, cold_items=2))
    found = evaluate(store, truth, EvaluationConfig(k=[5, 20], bootstrap=20, cold_events=30), events=events)
    history = events.engagements(T)
    return {
        "tensors": CheckpointConfig.read(folder / "model").sha256,
        "validation": report.validation,
        "loss": report.curve,
        "embeddings": rows_of(store),
        "graph": store.read_graph().to_pydict(),
        "candidates": store.read_candidates().to_pydict(),
        "popularity": store.read_popularity().to_pydict(),
        "counts": events.num_events(T).tolist(),
        "engagements": [column.tolist() for column in (history.offsets, history.items, history.timestamps)],
        "evaluation": asdict(found),
    }


def test_nothing_after_the_snapshot_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are there from the next second on, of every user, in a source that the model reads."""
    monkeypatch.setattr("alure.engine.evaluation.ranking.MIN_POSITIVES", 5)
    generator = np.random.default_rng(2)
    user = np.repeat(np.arange(55), 4)
    clicked = np.arange(len(user)) % 3 == 0
    item = generator.integers(0, ITEMS, len(user))
    truth = pa.table(
        {"user_id": np.concatenate([user, user[clicked]]), "item_id": np.concatenate([item, item[clicked]]),
         "timestamp": np.full(len(user) + clicked.sum(), T + 2 * DAY), "source": ["ads"] * (len(user) + clicked.sum()),
         "event_type": ["view"] * len(user) + ["click"] * clicked.sum()}
    )  # fmt: skip
    pq.write_table(truth, tmp_path / "truth.parquet")
    logs = {kind: later(kind).write(tmp_path / kind / "events") for kind in ("nothing", "usual", "leak")}
    found = {kind: outcome(events, tmp_path / kind, tmp_path / "truth.parquet") for kind, events in logs.items()}
    assert "gain" in found["nothing"]["evaluation"]["ne"]["ctr"]
    assert found["nothing"]["validation"]["retrieval"]["users"] > 20
    for kind in ("usual", "leak"):
        for name, value in found["nothing"].items():
            assert found[kind][name] == value, (kind, name)

    model = UserModel.load(tmp_path / "nothing" / "model")  # the test can fail: a second later all is seen
    catalog = model.catalog(logs["leak"])
    before, after = (model(logs["leak"].batch(range(55), time), catalog) for time in (T, T + 1))
    assert ((before - after).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_validation_does_not_see_what_comes_after_its_split(tmp_path: Path) -> None:
    """Each target of the validation is told by a hint a second before it; training and figures are as without."""
    config = TrainingConfig.model_validate(TRAINING)

    def run(log: Log, name: str) -> tuple[Events, Any, str]:
        events = log.write(tmp_path / name / "events")
        report = train(events, tiny_model(layers=1), config, tmp_path / name / "model", as_of=T)
        return events, report, CheckpointConfig.read(tmp_path / name / "model").sha256

    _, report, _ = run(past(T, T), "noise")
    split = report.validation["split"]
    assert START < split < T
    without, plain, plain_tensors = run(past(T, split), "without")
    told = past(T, split)
    targets = np.concatenate([rows for rows in told.rows["ads"] if rows[3, 0] == CLICK], axis=1)
    targets = targets[:, targets[1] > split + 1]
    told.add("hint", targets[0], targets[1] - 1, targets[2], VIEW)
    leaking, found, tensors = run(told, "told")
    assert tensors == plain_tensors
    assert found.validation == plain.validation
    assert found.curve == plain.curve
    model = UserModel.load(tmp_path / "told" / "model")
    users = np.unique(targets[0])
    a, b = (model(events.batch(users, T), model.catalog(events)) for events in (without, leaking))
    assert ((a - b).abs().amax(dim=(1, 2)) > 1e-4).all()  # who looks at T sees the hints


@pytest.mark.parametrize("kind", ["usual", "leak"])
def test_samples_hold_what_they_held(tmp_path: Path, kind: str) -> None:
    """What a training reads of any user at any moment up to T, column by column."""
    plain, other = (later(name).write(tmp_path / name) for name in ("nothing", kind))
    generator = np.random.default_rng(0)
    users = generator.integers(0, USERS, 200)
    times = np.append(START + generator.integers(0, 20 * DAY, 199), T)
    for a, b in zip(plain.batch(users, times, 8).sequences.values(), other.batch(users, times, 8).sequences.values()):
        for name, column in vars(a).items():
            same = getattr(b, name)
            assert (column is None and same is None) or np.array_equal(column, same), name
    early = plain.batch(users, times)
    late = [sequence.timestamps.numpy() for sequence in early.sequences.values()]
    owners = [np.repeat(np.arange(200), sequence.lengths.numpy()) for sequence in early.sequences.values()]
    assert all((time <= times[owner]).all() for time, owner in zip(late, owners))


def test_ingest_counts_only_what_came_before(tmp_path: Path) -> None:
    """Two logs that are the same up to T, with the same ids: columns of the events up to T are the same."""
    generator = np.random.default_rng(0)
    rows = [
        {"user_id": int(u), "timestamp": START + i, "item_id": int(x), "account_id": int(x) % 3, "source": "ads",
         "event_type": "view"}
        for i, (u, x) in enumerate(zip(generator.integers(0, 9, 300) % 8, generator.integers(0, 12, 300)))
    ]  # fmt: skip
    extra = [{**rows[i], "timestamp": START + 1_000 + i, "item_id": 5, "account_id": 2} for i in range(0, 300, 2)]
    plain, other = make_events(tmp_path, rows, name="plain"), make_events(tmp_path, [*rows, *extra], name="other")
    at = START + 300
    (a,), (b,) = (events.batch(range(8), at).sequences.values() for events in (plain, other))
    assert a.total == 300
    for name, column in vars(a).items():
        same = getattr(b, name)
        assert (column is None and same is None) or np.array_equal(column, same), name
    assert other.num_events().sum() == 450

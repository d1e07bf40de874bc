"""The report: whole from a small chain, from nothing, and from hostile input; looked at by a real browser."""

import json
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from matplotlib.figure import Figure
from support.browser import dump_dom, probed, with_probe

from alure.engine.config import Config, EvaluationConfig, EventsConfig
from alure.engine.errors import InputError
from alure.engine.evaluation import (
    ReportData,
    evaluate,
    gather_report_data,
    summary,
    write_figure,
    write_report,
)
from alure.engine.evaluation.charts import THEMED
from alure.engine.evaluation.figures import readme
from alure.engine.evaluation.layout import neighbour_layout, pca
from alure.engine.evaluation.sections import ranking
from alure.engine.events import Events, ingest
from alure.engine.retrieval import retrieve
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.world import World, build_world

SECTIONS = [
    "funnel", "sequence-lengths", "training", "embedding-map", "similarity", "degree", "candidates", "recall", "ne",
    "story", "quarantine",
]  # fmt: skip
CURVE = [{"step": i, "loss": 5.0 - i / 50, "retrieval": 4.0 - i / 50, "ctr": 0.6} for i in range(1, 100, 10)]
VALIDATION = {
    "retrieval": {"users": 90, "items": 400, "recall": {"10": 0.2}, "popularity_recall": {"10": 0.1}},
    "tasks": {"ctr": {"exposures": 900, "ne": 0.95, "item_rate_ne": 0.99}, "cvr": {"note": "no user has one"}},
}
PROBE = """
  const box = (e) => { const b = e.getBoundingClientRect(); return [Math.round(b.width), Math.round(b.height)]; };
  const sections = Array.from(document.querySelectorAll("section")).map((s) => ({
    id: s.id, height: box(s)[1], missing: (s.querySelector(".missing") || {}).textContent || "",
    drawings: Array.from(s.querySelectorAll("svg, img, table")).filter((e) => !e.closest("details, [hidden]")).map(box),
    shapes: s.querySelectorAll("svg path, svg circle, svg use, svg image").length,
  }));
  const buttons = document.querySelectorAll(".users button");
  if (buttons.length > 1) buttons[1].click();
  const open = Array.from(document.querySelectorAll("[role=tabpanel]")).map((e) => !e.hidden && box(e)[1] > 0);
  const unnamed = getComputedStyle(document.documentElement).getPropertyValue("--alure");
  return {sections, buttons: buttons.length, open, width: document.documentElement.scrollWidth, colour: unnamed};
"""


def embed(events: Events, as_of: int) -> np.ndarray:
    """Users by the content of what they did, float32 [users, 32]: a stand-in for the model."""
    vectors = np.zeros((events.num_users, 32))
    for name in events.manifest.sources:
        columns = events.source(name)
        users = np.repeat(np.arange(events.num_users), np.diff(columns.offsets))
        done = sp.csr_matrix((np.ones(len(users)), (users, columns.item)), shape=(events.num_users, len(events.items)))
        vectors += done @ np.asarray(events.items.dense, np.float64)
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def fill(store: EmbeddingStore, events: Events, as_of: int) -> None:
    """Embeddings and the exact similarity graph of one generation."""
    vectors, n = embed(events, as_of), events.num_users
    users = events.users.select(["user_id", "country"]).combine_chunks()
    columns = {
        "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        "as_of": pa.array([as_of] * n, pa.int64()),
        "model": pa.array(["content"] * n),
        "num_events": pa.array(events.num_events(as_of), pa.int64()),
        "refreshed_at": pa.array([datetime.now(UTC)] * n, pa.timestamp("us", "UTC")),
    }
    rows = pa.table({"user_id": users["user_id"], "country": users["country"], **columns})
    store.write_unit("g", "all", rows)
    store.publish(Generation("g", "embeddings", rows=n, as_of=as_of, model="content", properties={"k": 1, "d": 32}))
    ids, countries = users["user_id"].to_numpy(), np.array(users["country"].to_pylist())
    cosine = vectors @ vectors.T
    cosine[countries[:, None] != countries[None, :]] = -2
    np.fill_diagonal(cosine, -2)
    best = np.argsort(-cosine, axis=1, kind="stable")[:, :15]
    kept = [[j for j in best[i] if cosine[i, j] > 0] for i in range(n)]
    graph = pa.table(
        {
            "user_id": users["user_id"],
            "country": users["country"],
            "neighbor_ids": pa.array([ids[k].tolist() for k in kept], pa.list_(pa.int64())),
            "similarities": pa.array([cosine[i, k].tolist() for i, k in enumerate(kept)], pa.list_(pa.float32())),
        }
    )
    store.write_graph("g", "alure", graph.to_batches(), {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), 400, seed=1)


@pytest.fixture(scope="module")
def data(world: World, tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A chain of 400 users, with a training that is made up."""
    home = tmp_path_factory.mktemp("run")
    facts = json.loads(world.description.read_text())
    inputs = EventsConfig(inputs=[world.events], items=world.items, ad_sources=facts["ad_sources"])
    config = Config(
        output=home, name="A small world", events=inputs, evaluation=EvaluationConfig(truth=world.truth, bootstrap=50)
    )
    ingested = ingest(inputs, home / "events")
    events = Events.open(home / "events")
    store = EmbeddingStore(home / "store", create=True)
    fill(store, events, world.as_of)
    retrieved = {"alure": asdict(retrieve(store, events, config.retrieval, graphs=["alure"]))}
    evaluated = asdict(evaluate(store, world.truth, config.evaluation, events=events))
    trained = {"steps": 100, "users": 400, "parameters": 12_345, "curve": CURVE, "validation": VALIDATION}
    reports = {
        "ingest": ingested.model_dump(mode="json"),
        "train": trained,
        "retrieve": retrieved,
        "evaluate": evaluated,
    }
    stages = {name: {"seconds": 1.5, "report": json.loads(json.dumps(report))} for name, report in reports.items()}
    return gather_report_data(
        config, stages, events=events, store=store, world=facts, planted=world.users, truth=world.truth
    )


@pytest.fixture(scope="module")
def page(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("page"), data)


def look(page: Path, folder: Path) -> dict:
    """What a browser makes of `page`: {"found": PROBE's, "errors": […]}."""
    probe = with_probe(page, PROBE, folder / "probe.html")
    return json.loads(probed(dump_dom(probe, folder / "profile")))


def test_every_section_is_drawn_and_no_script_fails(data: ReportData, page: Path, tmp_path: Path) -> None:
    seen = look(page, tmp_path)
    assert seen["errors"] == []
    sections = {section["id"]: section for section in seen["found"]["sections"]}
    assert list(sections) == SECTIONS
    for name, section in sections.items():
        assert section["missing"] == "" or name == "ne", (name, section["missing"])
        if section["missing"]:
            continue
        assert section["drawings"], name
        assert all(width > 100 and height > 20 for width, height in section["drawings"]), (name, section["drawings"])
        if name not in ("funnel", "quarantine"):
            assert section["shapes"] > 5, name
    assert seen["found"]["width"] <= 1200  # nothing sticks out
    assert seen["found"]["buttons"] == len(data.stories) > 1
    assert seen["found"]["open"] == [place == 1 for place in range(len(data.stories))]


def test_nothing_comes_from_outside_the_page(page: Path) -> None:
    html = page.read_text()
    assert re.findall(r"https?://|//cdn|@import|src=|<link|<iframe", html) == []
    assert set(re.findall(r"url\(([^)]{0,6})", html)) <= {"#" + u[1:] for u in re.findall(r"url\((#[^)]{0,5})", html)}
    assert THEMED.ink[:5] not in html  # every stand-in colour became a variable
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_same_data_same_page(data: ReportData, page: Path, tmp_path: Path) -> None:
    assert write_report(tmp_path, data).read_bytes() == page.read_bytes()


def test_an_empty_run_says_why_of_each_section(tmp_path: Path) -> None:
    empty = ReportData(name="Nothing", seed=0, as_of=None, config={})
    html = write_report(tmp_path, empty).read_text()
    found = re.findall(r'<section id="([^"]+)">(.*?)</section>', html, re.DOTALL)
    assert [name for name, _ in found] == SECTIONS
    for name, body in found:
        assert 'class="missing"' in body or name == "quarantine", name
    seen = look(tmp_path / "report.html", tmp_path)
    assert seen["errors"] == []
    assert all(section["height"] > 40 for section in seen["found"]["sections"])


def test_no_exposures_is_a_reason_not_a_gap(data: ReportData) -> None:
    evaluated = {**data.report("evaluate"), "ne": {"ctr": {"reason": "the truth has no views (event_type 'view')"}}}
    made = ranking(replace(data, stages={"evaluate": {"seconds": 1.0, "report": evaluated}}))
    assert made.missing == "Not measurable. CTR: the truth has no views (event_type 'view')."


def test_hostile_names_stay_text(data: ReportData, tmp_path: Path) -> None:
    bad = "<script>window.__hacked = 1</script>$x_1$ \"'&"
    story = json.loads(json.dumps(data.stories[0]))
    story["user_id"] = bad
    story["ads"][0]["title"] = bad
    sources = {bad: next(iter(data.report("ingest")["sources"].values()))}
    placed = {"points": [[0, 1], [1, 0], [2, 2]], "labels": [bad, bad, "x"], "kind": bad, "of": 3}
    hostile = ReportData(
        name=bad,
        seed=0,
        as_of=0,
        config={"name": bad},
        stories=[story],
        stages={"ingest": {"seconds": 1.0, "report": {"sources": sources, "notes": [bad]}}},
        embedding_map=placed,
    )
    page = write_report(tmp_path, hostile)
    assert "<script>window.__hacked" not in page.read_text()
    assert look(page, tmp_path)["errors"] == []


def test_summary_holds_the_figures_that_matter(data: ReportData) -> None:
    found = summary(data)
    assert found["users"] == data.log["num_users"]
    assert set(found["recall"]) == {"alure", "popularity"}
    assert "alure − popularity, recall@10" in found["gains"]
    parts = ["cold users", "warm users", *(f"popularity {tenth}" for tenth in range(1, 11))]
    assert list(found["recall_by_slice"]) == [f"{name}, {part}" for name in ("alure", "popularity") for part in parts]
    assert found["not_measured"] == data.report("evaluate")["reasons"]
    assert found["seconds"]["retrieve"] == 1.5
    json.dumps(found, allow_nan=False)
    json.dumps(summary(ReportData(name="Nothing", seed=0, as_of=None, config={})), allow_nan=False)


def test_recall_is_shown_by_slice_and_auc_beside_entropy(data: ReportData, page: Path) -> None:
    html = page.read_text()
    assert "Cold: at most 10 events before the snapshot" in html
    assert "tenths of the ads to be recalled" in html
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    figures = dict.fromkeys(("ne_without", "ne_with", "gain", "auc_without"), interval)
    ctr = {**figures, "auc_with": {**interval, "value": 0.8125}, "exposures": 9, "positives": 2, "significant": False,
           "weights": {"intercept": 0.0}}  # fmt: skip
    evaluated = {**data.report("evaluate"), "ne": {"ctr": ctr}}
    measured = replace(data, stages={**data.stages, "evaluate": {"report": evaluated, "seconds": 1.0}})
    table = ranking(measured).tables[0]
    assert dict(zip(table.head, table.rows[0]))["AUC with"] == "0.8125"
    assert summary(measured)["auc"] == {"ctr": {"without": 0.5, "with": 0.8125}}
    gain = {"gain": 0.5, "low": 0.4, "high": 0.6, "value": 0.5}
    assert summary(measured)["ne"] == {"ctr": {"without": 0.5, "with": 0.5, **gain}}


def test_stories_are_of_known_users_and_reasons(data: ReportData, world: World) -> None:
    assert len(data.stories) == 6
    assert any(ad["later"] for story in data.stories for ad in story["ads"])
    for story in data.stories:
        assert story["neighbors"]
        assert all(ad["reason"] for ad in story["ads"])
        assert all(days >= 0 for lane in story["timeline"] for days in lane["days"])  # nothing after the snapshot
        similar = [neighbor["similarity"] for neighbor in story["neighbors"]]
        assert similar == sorted(similar, reverse=True)


def test_degrees_add_up(data: ReportData) -> None:
    graph = data.graphs["alure"]
    counts = np.array(graph["in_degree_counts"])
    assert (counts * np.arange(len(counts))).sum() == graph["edges"]
    assert counts.sum() == graph["users"]
    assert sum(graph["similarity_counts"]) == graph["edges"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_readme_figure(data: ReportData, tmp_path: Path, suffix: str) -> None:
    first = write_figure(tmp_path / f"a.{suffix}", data).read_bytes()
    assert write_figure(tmp_path / f"b.{suffix}", data).read_bytes() == first
    assert len(first) > 10_000
    assert THEMED.ink.encode() not in first
    write_figure(tmp_path / f"c.{suffix}", replace(data, embedding_map=None))


def test_nothing_of_the_readme_figure_is_cut_off(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    sets, mapped = data.report("evaluate")["sets"], data.embedding_map
    named = [{**found, "name": "alure+social+ppr"} for found in sets]  # the longest, which leaves the map least room
    readme(tmp_path / "a.svg", named, data.report("evaluate")["k"], mapped)
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in (axes.title, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()):
            extent = text.get_window_extent()
            assert extent.x0 >= 0, text
            assert extent.x1 <= figure.bbox.x1, text


def test_readme_figure_without_recall_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no measured recall"):
        write_figure(tmp_path / "a.svg", ReportData(name="Nothing", seed=0, as_of=None, config={}))


def test_layout_keeps_groups_together() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16)) * 3
    group = np.repeat(np.arange(5), 60)
    placed = neighbour_layout(centres[group] + rng.normal(size=(300, 16)), seed=0)
    assert np.isfinite(placed).all()
    distances = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :5]
    assert (group[nearest] == group[:, None]).mean() > 0.95


@pytest.mark.parametrize("n", [3, 12, 14, 40])
def test_layout_of_few_or_equal_points_is_finite(n: int) -> None:
    for x in (np.zeros((n, 8)), np.ones((n, 8)), np.eye(n, 8)):
        placed = neighbour_layout(x, seed=0, epochs=20)
        assert placed.shape == (n, 2)
        assert np.isfinite(placed).all()
        np.testing.assert_array_equal(placed, neighbour_layout(x, seed=0, epochs=20))


def test_pca_of_one_dimension_pads() -> None:
    placed = pca(np.arange(6.0)[:, None])
    assert placed.shape == (6, 2)
    np.testing.assert_allclose(np.abs(placed[:, 0]), np.abs(np.arange(6) - 2.5))

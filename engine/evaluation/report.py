"""Writes report.html: one self-contained page about a run. No address outside the page, one small script."""

from importlib.resources import files
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from alure.engine.errors import InputError
from alure.engine.evaluation import figures
from alure.engine.evaluation.charts import DARK, LIGHT, ROLES, label
from alure.engine.evaluation.report_data import ReportData
from alure.engine.evaluation.sections import headline_figures, make_sections, sorted_sets
from alure.engine.evaluation.wording import count, duration, when

TEMPLATE = "report.html.j2"


def write_report(out: Path, data: ReportData) -> Path:
    """Write OUT/report.html and return its path. `out` is made where it does not exist."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(render(data), encoding="utf-8")
    temporary.replace(path)
    return path


def write_figure(path: Path, data: ReportData) -> Path:
    """The README's figure, .svg or .png: recall of every candidate set, and the map of users.

    Raises InputError where the run has no recall to show.
    """
    evaluated = data.report("evaluate")
    if not evaluated.get("sets") or "recall" in evaluated.get("reasons", {}):
        raise InputError(f"figure: {data.name} has no measured recall; run the chain with a truth first")
    figures.readme(path, sorted_sets(evaluated["sets"]), evaluated["k"], data.embedding_map)
    return path


def render(data: ReportData) -> str:
    """The page as text."""
    loader = jinja2.FunctionLoader(lambda name: (files(__package__) / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(count=count, when=when, svg=Markup)
    return environment.get_template(TEMPLATE).render(
        data=data,
        sections=make_sections(data),
        facts=header_facts(data),
        headline=headline(data),
        light={role: getattr(LIGHT, role) for role in ROLES},
        dark={role: getattr(DARK, role) for role in ROLES},
        configuration=yaml.safe_dump(dict(data.config), sort_keys=False),
    )


def header_facts(data: ReportData) -> list[tuple[str, str, str]]:
    """(figure, unit, note): what a reader wants to know first."""
    facts = []
    log = data.log or {}
    if log:
        facts.append(
            (count(log["num_events"]), "events", f"{count(log['num_users'])} users, {count(log['num_items'])} items")
        )
    if data.embeddings:
        shape = f"{data.embeddings['k']} × {data.embeddings['d']} numbers each"
        facts.append((count(data.embeddings["users"]), "users embedded", shape))
    alure = data.graphs.get("alure")
    if alure:
        facts.append((count(alure["edges"]), "edges", f"median cosine {alure['similarity_median']:.2f}"))
    best, k = headline_figures(data)
    if best:
        value, baseline, rival = best
        facts.append(
            (
                f"{100 * value:.1f}%",
                f"recall@{k}, ALURE",
                f"{100 * baseline:.1f}% with {rival}",
            )
        )
    seconds = sum(stage.get("seconds", 0.0) for stage in data.stages.values())
    if seconds:
        facts.append((duration(seconds), "in all stages", f"{len(data.stages)} stages"))
    return facts


def headline(data: ReportData) -> str:
    """The run in one sentence; empty where recall was not measured."""
    best, k = headline_figures(data)
    if best is None:
        return ""
    value, baseline, rival = best
    others = [s for s in data.report("evaluate")["sets"] if s["name"] == "social+ppr"]
    paper = (
        f", {100 * others[0]['metrics']['recall'][str(k)]['value']:.1f}% with BFF + PPR"
        if others and rival != label("social+ppr")
        else ""
    )
    return (
        f"Of the ads that users engaged with after the snapshot, {100 * value:.1f}% are among the first {k} that "
        f"ALURE's similar users bring, against {100 * baseline:.1f}% with {rival}{paper}."
    )

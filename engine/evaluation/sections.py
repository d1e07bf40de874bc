"""The sections of the page, in its order: each from a run's figures, or with the reason why nothing is shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alure.engine.evaluation import figures
from alure.engine.evaluation.charts import label
from alure.engine.evaluation.report_data import ReportData
from alure.engine.evaluation.wording import count, duration, interval, log_share, percent

STAGES = {
    "ingest": "Ingest", "train": "Train", "refresh": "Refresh", "graph": "Graph", "retrieve": "Retrieve",
    "evaluate": "Evaluate",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One section of the page. `missing` says why there is nothing to draw; `extra` is for the template alone."""

    id: str
    title: str
    short: str
    lede: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)  # (inline svg, caption)
    tables: list[Table] = field(default_factory=list)
    missing: str = ""
    extra: Any = None


def make_sections(data: ReportData) -> list[Section]:
    """All sections of the page."""
    makers = (
        funnel, sequence_lengths, training, embedding_map, similarity, degree, candidates, recall, ranking, story,
        quarantine,
    )  # fmt: skip
    return [make(data) for make in makers]


def funnel(data: ReportData) -> Section:
    """What each stage made of what it got, and how long it took."""
    log, stages = data.log or {}, data.stages
    retrieved = data.report("retrieve")
    largest: Mapping[str, Any] = max(retrieved.values(), key=lambda r: r.get("candidates", 0), default={})
    evaluated = data.report("evaluate")
    edges = sum(graph["edges"] for graph in data.graphs.values())
    rows: list[tuple[str, Any, str, str]] = [
        ("Events", log.get("num_events"), "ingest", f"from {count(len(log.get('sources', [])))} sources"),
        (
            "Users",
            log.get("num_users"),
            "train",
            f"in {count(len(log.get('countries', [])))} countries; training learns from them",
        ),
        ("Embeddings", (data.embeddings or {}).get("users"), "refresh", "users with an event up to the snapshot"),
        ("Edges", edges or None, "graph", f"in {len(data.graphs)} graphs"),
        ("Candidates", largest.get("candidates"), "retrieve", f"largest set of {len(retrieved)}"),
        ("Users evaluated", evaluated.get("users"), "evaluate", "who engaged after the snapshot"),
    ]
    known = [row for row in rows if row[1]]
    if not known:
        return Section("funnel", "From events to candidates", "Funnel", missing="No stage has run.")
    widest = max(row[1] for row in known)
    steps = []
    for name, number, stage, note in known:
        ran = stages.get(stage, {})
        steps.append(
            {
                "name": name,
                "count": count(number),
                "share": max(log_share(number, widest), 0.02),
                "stage": STAGES[stage],
                "seconds": duration(ran["seconds"]) if ran.get("seconds") else "not run here",
                "note": note,
            }
        )
    total = sum(stage.get("seconds", 0.0) for stage in stages.values())
    peak = max((stage.get("peak_rss_bytes", 0) for stage in stages.values()), default=0)
    lede = f"The chain took {duration(total)}" + (f" and at most {peak / 2**30:.1f} GiB of memory." if peak else ".")
    return Section("funnel", "From events to candidates", "Funnel", lede, extra=steps)


def sequence_lengths(data: ReportData) -> Section:
    title = "Sequence lengths"
    sources = data.report("ingest").get("sources")
    if not sources:
        return Section(
            "sequence-lengths", title, "Lengths", missing="Ingest did not run here, so lengths were not counted."
        )
    longest = max(sources.values(), key=lambda s: s["longest"])
    events = sum(s["events"] for s in sources.values())
    lede = (
        f"{count(events)} events in {len(sources)} jagged sequences a user. Most users have few, some have many: "
        f"the longest holds {count(longest['longest'])}. Nothing is padded or cut."
    )
    head = ["Source", "Events", "Users with any", "Mean", "Median", "p90", "p99", "Longest"]
    rows = [
        [
            name,
            count(s["events"]),
            count(s["users"]),
            f"{s['mean']:.1f}",
            *(count(s[k]) for k in ("p50", "p90", "p99", "longest")),
        ]
        for name, s in sources.items()
    ]
    drawn = figures.sequence_lengths(sources)
    caption = "Users by number of events of a source. Grey: none."
    return Section("sequence-lengths", title, "Lengths", lede, [(drawn, caption)], [Table(head, rows)])


def training(data: ReportData) -> Section:
    title = "Training"
    report = data.report("train")
    curve = [p for p in report.get("curve", []) if "step" in p and "loss" in p]
    if not curve:
        return Section("training", title, "Training", missing="No training ran here: the model came from elsewhere.")
    lede = f"{count(report.get('steps', curve[-1]['step']))} steps on {count(report.get('users', 0))} users"
    if report.get("parameters"):
        lede += f", {count(report['parameters'])} parameters"
    lede += f". The loss went from {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}."
    groups, rows = _validation(report.get("validation") or {})
    caption = "Loss: means since the point before."
    if groups:
        caption += " Validation: on the newest part of the training time, before the model had seen it."
    drawn = [(figures.training(curve, groups), caption)]
    tables = [Table(["Validation", "Model", "Baseline", "Measured on"], rows)] if rows else []
    return Section("training", title, "Training", lede, drawn, tables)


def _validation(found: Mapping[str, Any]) -> tuple[list[tuple[str, float, float, str]], list[list[str]]]:
    """(bars, table rows) of the training's own validation figures."""
    groups: list[tuple[str, float, float, str]] = []
    rows = []
    retrieval = found.get("retrieval") or {}
    for k, value in (retrieval.get("recall") or {}).items():
        base = retrieval["popularity_recall"][k]
        groups.append((f"recall@{k}", value, base, "popularity"))
        on = f"{count(retrieval['users'])} users, {count(retrieval['items'])} {retrieval.get('level', 'item')}s"
        rows.append([f"Two-tower recall@{k}", f"{value:.4f}", f"{base:.4f} (popularity)", on])
    if retrieval.get("note"):
        rows.append(["Two-tower recall", "not measured", "", retrieval["note"]])
    for task, one in (found.get("tasks") or {}).items():
        if one.get("ne") is not None and one.get("item_rate_ne") is not None:
            groups.append((f"NE {task}", one["ne"], one["item_rate_ne"], "ad rate"))
            on = f"{count(one['exposures'])} exposures"
            rows.append(
                [f"NE of {task}", f"{one['ne']:.4f}", f"{one['item_rate_ne']:.4f} (smoothed rate of the ad)", on]
            )
        else:
            rows.append([f"NE of {task}", "not measured", "", one.get("note", "")])
    return groups, rows


def embedding_map(data: ReportData) -> Section:
    title = "Map of the embeddings"
    found = data.embedding_map
    if not found:
        return Section("embedding-map", title, "Map", missing="The store holds no embeddings, or fewer than three.")
    lede = (
        f"{count(len(found['points']))} of {count(found['of'])} users, laid out so that users who are near each "
        "other in embedding space stay together."
    )
    if found["kind"] != "country":
        lede += f" Colour is the {found['kind']}, which the model was never told."
    drawn = figures.embedding_map(found["points"], found["labels"], found["kind"])
    return Section(
        "embedding-map",
        title,
        "Map",
        lede,
        [(drawn, "Neighbourhoods are meaningful; distances between far groups are not.")],
    )


def similarity(data: ReportData) -> Section:
    title = "Similarity of linked users"
    graphs = _in_order({name: g for name, g in data.graphs.items() if g["edges"]})
    if not graphs:
        return Section("similarity", title, "Similarity", missing="No graph with edges has been built.")
    first = next(iter(graphs))
    lede = f"Median similarity of an edge in {label(first)}: {graphs[first]['similarity_median']:.3f}."
    head = ["Graph", "Users", "With neighbours", "Edges", "Median similarity"]
    rows = [
        [
            label(name),
            count(g["users"]),
            count(g["users_with_neighbors"]),
            count(g["edges"]),
            f"{g['similarity_median']:.3f}",
        ]
        for name, g in graphs.items()
    ]
    caption = (
        "Each graph has its own measure: cosine of embeddings, mutual and shared follows, how often a walk visits."
    )
    return Section(
        "similarity", title, "Similarity", lede, [(figures.similarities(graphs), caption)], [Table(head, rows)]
    )


def degree(data: ReportData) -> Section:
    title = "In-degree"
    graphs = _in_order({name: g for name, g in data.graphs.items() if g["edges"]})
    if not graphs:
        return Section("degree", title, "Degree", missing="No graph with edges has been built.")
    first = next(iter(graphs))
    counts = graphs[first]["in_degree_counts"]
    share = counts[0] / max(sum(counts), 1)
    lede = (
        f"Edges go from a user to its neighbours. In {label(first)} the most popular neighbour serves "
        f"{len(counts) - 1:,} users, and {share:.1%} of users are nobody's neighbour."
    )
    return Section(
        "degree",
        title,
        "Degree",
        lede,
        [(figures.degrees(graphs), "The steeper a line falls, the less a few users dominate the graph.")],
    )


def candidates(data: ReportData) -> Section:
    title = "Candidates a user"
    reports = {name: r for name, r in data.report("retrieve").items() if isinstance(r, Mapping) and r.get("histogram")}
    if not reports:
        return Section("candidates", title, "Candidates", missing="No candidates were retrieved here.")
    reports = _in_order(reports)
    sets = {name: {**r["histogram"], "mean": r["candidates_per_user"]["mean"]} for name, r in reports.items()}
    name = "alure" if "alure" in reports else next(iter(reports))
    cap = (data.config.get("retrieval") or {}).get("cap")
    lede = f"{label(name)} brings {sets[name]['mean']:,.0f} ads a user on average" + (
        f", at most {cap:,}." if cap else "."
    )
    head = ["Set", "Users", "Without candidates", "At the cap", "Candidates", "Mean", "Reasons"]
    rows = [
        [
            label(n), count(r["users"]), count(r["users_without_candidates"]), count(r["users_at_cap"]),
            count(r["candidates"]), f"{r['candidates_per_user']['mean']:,.1f}",
            ", ".join(f"{reason} {share:.0%}" for reason, share in r["reasons"].items() if share > 0),
        ]
        for n, r in reports.items()
    ]  # fmt: skip
    caption = "The paper's Figure 8. Dashed: mean."
    return Section("candidates", title, "Candidates", lede, [(figures.candidates(sets), caption)], [Table(head, rows)])


def recall(data: ReportData) -> Section:
    title = "Recall of future engagements"
    evaluated = data.report("evaluate")
    if not evaluated:
        return Section("recall", title, "Recall", missing="Evaluation did not run.")
    if "recall" in evaluated.get("reasons", {}):
        return Section("recall", title, "Recall", missing=f"Not measurable: {evaluated['reasons']['recall']}.")
    sets, ks = sorted_sets(evaluated["sets"]), evaluated["k"]
    best, k = headline_figures(data)
    pairs = evaluated["truth"]["pairs"]
    lede = f"{count(evaluated['users'])} users engaged with {count(pairs)} ads after the snapshot. "
    if best:
        value, baseline, rival = best
        lede += f"Within {k} ads, ALURE finds {100 * value:.1f}% of them, {rival} (the best without it) "
        lede += f"{100 * baseline:.1f}%."
    drawn = [
        (
            figures.recall(sets, ks),
            f"Mean over users with 95 % intervals ({evaluated['bootstrap']} bootstrap samples of users).",
        )
    ]
    if evaluated["differences"]:
        text = "Differences over the same users, 95 % intervals. Grey: the interval holds zero."
        drawn.append((figures.differences(evaluated["differences"], ks), text))
    head = [
        "Set",
        *[f"{m}@{k}" for m in ("Recall", "NDCG", "Hit rate") for k in ks],
        *[f"Coverage@{k}" for k in ks],
        *[f"P90 cov.@{k}" for k in ks],
    ]
    rows = [
        [
            label(s["name"]),
            *[interval(s["metrics"][m][str(k)]) for m in ("recall", "ndcg", "hit_rate") for k in ks],
            *[percent(s[c][str(k)]) for c in ("coverage", "p90_coverage") for k in ks],
        ]
        for s in sets
    ]  # fmt: skip
    counts = [[name.replace("_", " "), count(value)] for name, value in evaluated["truth"].items()]
    parts = _slice_tables(sets, evaluated.get("slices") or {}, k)
    caption = (
        "Coverage: share of all ads in anybody's list. P90 coverage: share of ads that fills 90 % of all list entries."
    )
    tables = [
        Table(head, rows, caption),
        *parts,
        Table(["Truth", "Rows"], counts, "What the truth held, and what of it was used."),
    ]
    return Section("recall", title, "Recall", lede, drawn, tables)


def _slice_tables(sets: list[Mapping[str, Any]], slices: Mapping[str, Any], k: int) -> list[Table]:
    """Recall@k by the users' past and by the ads'."""
    tables = []
    for kind, parts in slices.items():
        if kind == "users":
            heads = [f"{name} ({count(part['users'])} users)" for name, part in parts.items()]
            told = f"Recall@{k}. Cold: at most {parts['cold']['most_events']} events before the snapshot."
        else:
            heads = [f"{name} ({count(part['pairs'])})" for name, part in parts.items()]
            told = (
                f"Recall@{k} by popularity: tenths of the ads to be recalled by their engagements before the snapshot, "
                "the least popular first; equals are together. In brackets: user–ad pairs."
            )
        rows = [
            [label(s["name"]), *[interval(s["slices"][kind][name]["recall"][str(k)]) for name in parts]] for s in sets
        ]
        tables.append(Table(["Set", *heads], rows, told))
    return tables


def ranking(data: ReportData) -> Section:
    title = "Ranking features: normalized entropy"
    tasks = data.report("evaluate").get("ne") or {}
    measured = {name: t for name, t in tasks.items() if "gain" in t}
    reasons = "; ".join(f"{name.upper()}: {t['reason']}" for name, t in tasks.items() if "reason" in t)
    if not measured:
        why = f"Not measurable. {reasons}." if tasks else "Evaluation did not run."
        return Section("ne", title, "NE", missing=why)
    parts, rows = [], []
    for name, t in measured.items():
        gain = {key: 100 * value for key, value in t["gain"].items()}
        bounds = f"{gain['low']:+.2f} to {gain['high']:+.2f}"
        verdict = "significant" if t["significant"] else "not significant"
        parts.append(f"{name.upper()} {gain['value']:+.2f}% ({bounds}, {verdict})")
        without, with_ = (f"{t[key]['value']:.4f}" for key in ("ne_without", "ne_with"))
        areas = [f"{t[key]['value']:.4f}" for key in ("auc_without", "auc_with")]
        counts = [count(t["exposures"]), count(t["positives"])]
        rows.append([name.upper(), *counts, without, with_, f"{gain['value']:+.2f}% ({bounds})", *areas])
    lede = f"NE gain of a logistic ranker when it gets ALURE's embeddings as features: {'; '.join(parts)}."
    head = ["Task", "Exposures", "Positives", "NE without", "NE with", "Gain", "AUC without", "AUC with"]
    tables = [Table(head, rows, reasons and f"Not measurable: {reasons}.")]
    _, trained = _validation(data.report("train").get("validation") or {})
    trained = [row for row in trained if row[0].startswith("NE of")]
    if trained:
        told = "The training's own tasks, on the newest part of the training time."
        tables.append(Table(["Training task", "Model", "Baseline", "Measured on"], trained, told))
    features = [k for k in next(iter(measured.values()))["weights"] if k != "intercept"]
    weights = [[f, *[f"{t['weights'][f]:+.3f}" for t in measured.values()]] for f in features]
    told = "Mean weights of the ranker with ALURE."
    tables.append(Table(["Standardised feature", *[n.upper() for n in measured]], weights, told))
    caption = "Each half of the users is scored by the ranker fitted on the other half. Intervals over users."
    return Section("ne", title, "NE", lede, [(figures.ne_gains(measured), caption)], tables)


def story(data: ReportData) -> Section:
    title = "One user's story"
    if not data.stories:
        return Section(
            "story", title, "Story", missing="Needs an event log, a graph and candidates; one of them is missing."
        )
    longest = max((max(t["days"], default=0.0) for s in data.stories for t in s["timeline"]), default=1.0) or 1.0
    lede = "What a user did, who is like that user, and which ads that brings, with the reason of each."
    return Section("story", title, "Story", lede, extra={"stories": data.stories, "span": longest})


def quarantine(data: ReportData) -> Section:
    """Rows refused, and everything a reader should be warned of."""
    title = "Quarantine and warnings"
    ingest = data.report("ingest")
    refused = (data.log or {}).get("quarantine") or ingest.get("quarantine") or {}
    rows = [[reason, count(number)] for reason, number in refused.items()]
    warnings = [str(note) for note in ingest.get("notes", [])]
    if ingest.get("ignored_columns"):
        warnings.append(f"Columns not read: {', '.join(ingest['ignored_columns'])}.")
    truth = data.report("evaluate").get("truth", {})
    for key, text in (
        ("unknown_users", "users of the truth have no embedding, so they are not part of the recall"),
        ("unknown_items", "items of the truth are not in the log; they count as misses"),
        ("not_after_as_of", "rows of the truth are not after the snapshot and were left out"),
        ("not_an_ad_source", "rows of the truth are not of an ad source and were left out"),
        ("null_id", "rows of the truth have no user or no item and were left out"),
    ):
        if truth.get(key):
            warnings.append(f"{count(truth[key])} {text}.")
    for name, report in data.report("retrieve").items():
        if isinstance(report, Mapping) and report.get("users_without_candidates"):
            warnings.append(f"{label(name)}: {count(report['users_without_candidates'])} users got no candidates.")
    for task, found in (data.report("evaluate").get("ne") or {}).items():
        if "reason" in found:
            warnings.append(f"NE of {task} was not measured: {found['reason']}.")
    total = sum(refused.values())
    lede = f"{count(total)} rows were refused." if total else "No row was refused."
    table = Table(["Reason", "Rows"], rows or [["none", "0"]])
    return Section("quarantine", title, "Warnings", lede, tables=[table], extra=warnings)


def headline_figures(data: ReportData) -> tuple[tuple[float, float, str] | None, int]:
    """(recall of ALURE, of the best set without it, that set's label), and K: the middle one."""
    evaluated = data.report("evaluate")
    ks = evaluated.get("k") or [0]
    k = ks[len(ks) // 2]
    found = {s["name"]: s["metrics"]["recall"][str(k)] for s in evaluated.get("sets", [])}
    found = {name: value["value"] for name, value in found.items() if value}
    others = {name: value for name, value in found.items() if "alure" not in name.split("+")}
    if "alure" not in found or not others:
        return None, k
    rival = max(others, key=lambda name: others[name])
    return (found["alure"], others[rival], "popularity" if rival == "popularity" else label(rival)), k


def _in_order(named: Mapping[str, Any]) -> dict[str, Any]:
    """ALURE first, then blends with it, the other graphs, their blends, and popularity last."""
    return {name: named[name] for name in sorted(named, key=_place)}


def _place(name: str) -> tuple[int, int, str]:
    first = {"alure": 0, "social": 2, "ppr": 3, "popularity": 9}
    graphs = name.split("+")
    if len(graphs) > 1:
        return (1 if "alure" in graphs else 4, len(graphs), name)
    return (first.get(name, 5), 0, name)


def sorted_sets(sets: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(sets, key=lambda s: _place(s["name"]))

"""What users type: `alure COMMAND --help` teaches each command with an example.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 interrupted (run the same command again to go on).
With --json the last line on stdout is one JSON object with what the command did.
"""

import atexit
import errno
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from alure.engine.cli_quantize import quantize
from alure.engine.config import Config, EventsConfig, TrainingConfig
from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.options import (
    AsOf,
    Commands,
    ConfigFile,
    Json,
    Out,
    Seed,
    StoreArgument,
    finish,
    load_config,
    override,
    parse_time,
)
from alure.engine.progress import say
from alure.engine.signals import ignore_signals, interruptible

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 75
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, such as a second Ctrl-C
UsageError: Any = typer.BadParameter.__base__  # click's, which typer keeps under a private name

app = Commands(
    name="alure",
    help="User embeddings from event histories, similarity graphs from embeddings, ad candidates from graphs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(quantize)


def parse_map(pairs: list[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        ours, separator, theirs = pair.partition("=")
        if not separator or not ours or not theirs:
            raise InputError(f"--map: expected OUR_NAME=THEIR_NAME such as user_id=uid, got {pair!r}")
        columns[ours] = theirs
    return columns


def parse_quotas(pairs: list[str]) -> dict[str, int]:
    quotas = {}
    for pair in pairs:
        graph, _, most = pair.partition("=")
        if not graph or not re.fullmatch(r"\d+", most):
            raise InputError(f"--quota: expected GRAPH=NUMBER such as alure=1200, got {pair!r}")
        quotas[graph] = int(most)
    return quotas


@app.command()
def demo(
    out: Out,
    users: Annotated[int, typer.Option(min=50, help="Users of the synthetic world.")] = 5000,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps; fewer are quicker and worse.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole chain on a synthetic ads world with planted truth; writes OUT/report.html and OUT/summary.json.

    Example: `alure demo --out demo`
    """
    from alure.engine.pipeline import run_demo

    finish(run_demo(out, users, seed, override(TrainingConfig(), steps=steps)), as_json)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Inputs and settings of the run.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the inputs (default: the configuration's).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Instead of the configuration's output folder.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the configuration's JSON Schema and stop.")] = False,
    as_json: Json = False,
) -> None:
    """The whole chain on real input, stage by stage; stages whose input did not change are reused.

    Example: `alure run examples/retail_rocket.yaml --data ~/data --out runs/retail_rocket`
    """
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=None if as_json else 2))  # noqa: T201
        return
    if config is None:
        raise InputError("run: expected a configuration file, such as `alure run examples/retail_rocket.yaml`")
    from alure.engine.pipeline import run_pipeline

    settings = Config.load(config, data)
    finish(run_pipeline(settings.model_copy(update={"output": out}) if out else settings), as_json)


@app.command()
def ingest(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Parquet files, folders or Delta tables.")],
    out: Out,
    items: Annotated[Path | None, typer.Option(help="Items: item_id, account_id, category_id, title, dense, …")] = None,
    column: Annotated[list[str] | None, typer.Option("--map", help="Our column name = yours: user_id=uid.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Only these sources; others go to quarantine.")] = None,
    ad_source: Annotated[list[str] | None, typer.Option(help="Sources whose items are ads (default: all).")] = None,
    latest: Annotated[str | None, typer.Option(help="Later events go to quarantine (default: now).")] = None,
    max_quarantine_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="A larger share of bad rows stops the job (0.05).")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Validate, sort and group event logs into per-user jagged sequences; bad rows go to OUT/quarantine with a reason.

    Example: `alure ingest logs/2026-11-*.parquet --items ads.parquet --map user_id=uid --out events`
    """
    from alure.engine.events import ingest as ingest_events

    section: EventsConfig = override(
        load_config(config).events,
        inputs=inputs,
        items=items,
        columns=parse_map(column) if column else None,
        sources=source,
        ad_sources=ad_source,
        latest=parse_time(latest, "--latest"),
        max_quarantine_share=max_quarantine_share,
    )
    finish(ingest_events(section, out), as_json)


@app.command()
def train(
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote.")],
    out: Out,
    warm_start: Annotated[Path | None, typer.Option(help="Go on from this model's weights.")] = None,
    preset: Annotated[str | None, typer.Option(help="small, base or large.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Batches to learn from (default: 4 passes over the users, 120 to 600).")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between validations; the best model is kept (default: the last).")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Validations in a row without a better figure that end the training.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 over float32 weights.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    as_of: AsOf = None,
    seed: Seed = 0,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Train the user model on the events up to a snapshot time.

    A training that was stopped or killed goes on when the same command is given again. Under torchrun the processes
    share every batch, and the first one writes.

    Example: `alure train events --out model --preset small`

    Example: `alure train events --out model --steps 5000 --validate-every 100 --patience 5 --tensorboard runs/today`

    Example: `torchrun --nproc-per-node 8 -m alure.engine.cli train events --out model --preset base`
    """
    from alure.engine.events import Events
    from alure.engine.training import leads
    from alure.engine.training import train as train_model

    settings = load_config(config)
    model = override(settings.model, preset=preset)
    report = train_model(
        Events.open(events),
        model,
        override(
            settings.training,
            steps=steps,
            validate_every=validate_every,
            patience=patience,
            precision=precision,
            tensorboard=tensorboard,
        ),
        out,
        as_of=parse_time(as_of),
        seed=seed,
        warm_start=warm_start,
    )
    if leads():
        finish(report, as_json)


@app.command()
def align(
    model: Annotated[Path, typer.Argument(help="What `alure train` wrote.")],
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote.")],
    to: Annotated[Path, typer.Option(help="The earlier model, whose space the embeddings shall lie in.")],
    out: Out,
    as_of: AsOf = None,
    anchors: Annotated[int, typer.Option(min=2, help="Users that both models embed, at most.")] = 10_000,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Turn a new model's embeddings onto an earlier model's, so that generations of the two compare.

    An orthogonal matrix an embedding, which both towers apply: no cosine, score or prediction of the model changes.

    Example: `alure align model events --to yesterday/model --out aligned`, then `alure refresh aligned events …`
    """
    from alure.engine.events import Events
    from alure.engine.refresh.align import align as align_model

    longest = load_config(config).refresh.max_events
    report = align_model(
        model, to, Events.open(events), out, as_of=parse_time(as_of), max_events=longest, anchors=anchors
    )
    finish(report, as_json)


@app.command()
def refresh(
    model: Annotated[Path, typer.Argument(help="What `alure train` wrote.")],
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote.")],
    store: Annotated[str, typer.Option(help="The embedding store, a folder or s3://bucket/prefix; made when missing.")],
    as_of: AsOf = None,
    incremental: Annotated[bool, typer.Option(help="Only users with new events; others are carried forward.")] = False,
    max_age_days: Annotated[float | None, typer.Option(min=0, help="With --incremental: older ones anew.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="With --incremental: who changed most comes first.")] = None,
    kv_cache: Annotated[
        bool,
        typer.Option(
            "--kv-cache", help="Keep keys and values: --incremental then runs new events only; causal models."
        ),
    ] = False,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Events a batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    output_dtype: Annotated[
        str | None,
        typer.Option("--output-dtype", "--dtype", help="Of the embeddings in the store: float32, float16 or int8."),
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Publish even where a threshold of refresh.drift is missed.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, Ray actors or Spark tasks.")] = 1,
    engine: Annotated[str, typer.Option(help="Who runs them: local, ray or spark.")] = "local",
    metrics: Annotated[Path | None, typer.Option(help="Write the figures here for Prometheus (*.prom).")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Serve the figures to Prometheus while the job runs; 0: any.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="The address that serves them.")] = "127.0.0.1",
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Embed the whole user base into a new generation of the store, published all at once. Run again to resume.

    Example: `alure refresh model events --store store --as-of 2026-11-22`

    Example: `alure refresh model events --store s3://bucket/store`; credentials, region and endpoint: `AWS_…` variables
    """
    from alure.engine.metrics import serve_metrics, write_metrics
    from alure.engine.refresh import RefreshJob

    if metrics_port is not None and engine != "local":
        raise InputError("--metrics-port: processes of other engines tell their figures at their end; use --metrics")
    section = load_config(config).refresh
    if allow_drift:
        section = section.model_copy(update={"drift": section.drift.reported()})
    job = RefreshJob(
        model,
        events,
        store,
        as_of=parse_time(as_of),
        incremental=incremental,
        config=override(
            section,
            token_budget=token_budget,
            precision=precision,
            output_dtype=output_dtype,
            max_age=None if max_age_days is None else round(max_age_days * 86_400),
            max_minutes=max_minutes,
            kv_cache=kv_cache or None,
        ),
        workers=workers,
        engine=engine,
    )
    with ExitStack() as serving:
        if metrics_port is not None:
            address = serving.enter_context(serve_metrics(metrics_host, metrics_port, job.metrics))
            say(f"refresh: figures at {address}")
        report = job.run()
    if metrics:
        write_metrics(metrics, job.metrics(report))
    finish(report, as_json)


@app.command()
def graph(
    store: StoreArgument,
    nlist: Annotated[
        str | None,
        typer.Option(help="k1: clusters a country (400), or auto: √users of each, which is about the fastest."),
    ] = None,
    nprobe: Annotated[
        str | None,
        typer.Option(
            help="k'1: clusters a user searches (50), or auto, as with --nlist auto: as few as reach the recall "
            "target, measured on 1,000 users of each country."
        ),
    ] = None,
    recall_target: Annotated[
        float | None,
        typer.Option(help="Share of the true neighbours to find with nprobe auto (0.95); more takes longer."),
    ] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="k2: neighbours a user (15).")] = None,
    average: Annotated[
        int | None, typer.Option(min=1, help="Newest generations whose embeddings are averaged, all in one space (1).")
    ] = None,
    search: Annotated[str | None, typer.Option(help="auto, faiss, grouped or exact.")] = None,
    social: Annotated[
        Path | None, typer.Option(help="Follows (user_id, followed_id): adds the graph `social`.")
    ] = None,
    ppr: Annotated[bool, typer.Option("--ppr", help="Personalized PageRank over the follows: adds `ppr`.")] = False,
    incremental: Annotated[
        bool,
        typer.Option(
            "--incremental",
            help="From the newest earlier graph, in its clusters: only users whose embedding changed are searched, and "
            "those whose neighbours they enter or leave.",
        ),
    ] = False,
    clusters: Annotated[
        Path | None,
        typer.Option(
            help="Use the centroids of FAISS files COUNTRY.faiss in this folder (IndexIVFFlat); others are refused."
        ),
    ] = None,
    seed: Seed = 0,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Link every user to the most similar users of the same country.

    Example: `alure graph store --nlist 400 --nprobe 50 -k 15 --social follows.parquet --ppr`

    Example: `alure graph store --nlist auto --recall-target 0.9`; the report says what each country got

    Example: `alure graph store --incremental` after `alure refresh … --incremental`
    """
    from alure.engine.graph import build_graphs
    from alure.engine.store import EmbeddingStore

    section = override(
        load_config(config).graph,
        nlist=nlist,
        nprobe=nprobe,
        recall_target=recall_target,
        k=k,
        average=average,
        search=search,
        ppr=ppr or None,
    )
    if section.ppr and social is None:
        raise InputError("--ppr: needs the follows that PageRank walks over; add --social FOLLOWS.parquet")
    report = build_graphs(
        EmbeddingStore(store), section, social=social, incremental=incremental, clusters=clusters, seed=seed
    )
    finish(report, as_json)


@app.command()
def retrieve(
    store: StoreArgument,
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote.")],
    out: Annotated[
        str | None, typer.Option("--out", help="The store that gets the candidates (default: STORE).")
    ] = None,
    cap: Annotated[int | None, typer.Option(min=1, help="Candidates a user at most (1500).")] = None,
    graphs: Annotated[str | None, typer.Option(help="Which graphs to blend: alure,social,ppr (default: all).")] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Most ads a graph brings to the blend: alure=1200; repeat the option (default: the cap)."),
    ] = None,
    eligible: Annotated[
        Path | None,
        typer.Option(
            help="The inventory: item_id, and country where it differs. Other ads are left out; those of it "
            "that nobody has engaged yet come in through their account."
        ),
    ] = None,
    account_cap: Annotated[
        int | None, typer.Option(min=1, help="Most ads of one account in a user's list (default: any number).")
    ] = None,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out ads the user has engaged.")] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Hand each user the ads that similar users engaged with, and other ads of the same accounts.

    score = Σ similarity × engagement weight × 0.5^(age ÷ half-life); other ads of an account count a fifth. Graphs are
    blended by their scores divided by the user's best one. Weights, half-life and the rest: `retrieval` in --config.

    Example: `alure retrieve store events --out store --cap 1500 --graphs alure,social --quota alure=1200`

    Example: `alure retrieve store events --eligible inventory.parquet --account-cap 20 --exclude-seen`
    """
    from alure.engine.events import Events
    from alure.engine.retrieval import retrieve as retrieve_candidates
    from alure.engine.store import EmbeddingStore

    section = override(
        load_config(config).retrieval,
        cap=cap,
        quotas=parse_quotas(quota) if quota else None,
        eligible=eligible,
        account_cap=account_cap,
        exclude_seen=exclude_seen or None,
    )
    names = [name.strip() for name in graphs.split(",") if name.strip()] if graphs else None
    source, target = EmbeddingStore(store), EmbeddingStore(out or store, create=True)
    finish(retrieve_candidates(source, Events.open(events), section, graphs=names, out=target), as_json)


@app.command()
def evaluate(
    store: StoreArgument,
    truth: Annotated[Path, typer.Option(help="Future engagements: user_id, item_id, …")],
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="Cut-offs; repeat the option.")] = None,
    events: Annotated[Path | None, typer.Option(help="The event log: adds Normalized Entropy of a ranker.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the report (default: beside the store).")] = None,
    seed: Seed = 0,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Recall, NDCG, coverage and NE of the candidates against what happened next, with confidence intervals.

    Example: `alure evaluate store --truth tomorrow.parquet -k 10 -k 50 -k 200`
    """
    from alure.engine.pipeline import run_evaluation

    section = override(load_config(config).evaluation, k=k)
    finish(run_evaluation(store, truth, section, events=events, out=out, seed=seed), as_json)


@app.command()
def rank(
    model: Annotated[Path, typer.Argument(help="What `alure train` wrote.")],
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote: everything before what is held out.")],
    truth: Annotated[Path, typer.Option(help="One held-out item a user: user_id, item_id.")],
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="Cut-offs; repeat the option.")] = None,
    max_events: Annotated[int | None, typer.Option(min=1, help="Newest events a source (default: all).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Leave-one-out: how high the two-tower head ranks each user's held-out item among all items it has not seen.

    Full ranking, no sampled candidates: HR@K and NDCG@K as SASRec's successors report them, with 95 % intervals.

    Example: `alure rank model events --truth test.parquet -k 10 -k 50 --max-events 200`
    """
    from alure.engine.events import Events
    from alure.engine.training.full_ranking import rank_truth

    finish(rank_truth(model, Events.open(events), truth, k or [10, 50], max_events=max_events, seed=seed), as_json)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A store (also s3://bucket/prefix), a model or an event log.")],
    user: Annotated[str | None, typer.Option(help="One user: history, or neighbours and candidates.")] = None,
    as_json: Json = False,
) -> None:
    """What is in a store, a model or an event log: generations, row counts, sizes, quality at a glance.

    Example: `alure inspect store --user 42`
    """
    from alure.engine.inspection import inspect_path

    finish(inspect_path(path, user), as_json or user is not None)


@app.command()
def verify(
    store: StoreArgument,
    generation: Annotated[str | None, typer.Option(help="Only this one (default: all that are published).")] = None,
    as_json: Json = False,
) -> None:
    """Read every published file of a store and compare it with its checksum; exit 1 names what is damaged.

    Example: `alure verify store`
    """
    from alure.engine.store import EmbeddingStore
    from alure.engine.store.upkeep import verify as verify_store

    finish(verify_store(EmbeddingStore(store), generation), as_json)


@app.command()
def rollback(
    store: StoreArgument,
    to: Annotated[
        str | None, typer.Option(help="This generation becomes the newest (default: the one before).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Withdraw the newest generation, and the graphs and candidates made from it; `--to` it brings it back.

    Example: `alure rollback store`
    """
    from alure.engine.store import EmbeddingStore
    from alure.engine.store.upkeep import rollback as roll_back

    finish(roll_back(EmbeddingStore(store), to), as_json)


@app.command()
def vacuum(
    store: StoreArgument,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Newest generations to keep (default: all published).")
    ] = None,
    grace_hours: Annotated[float, typer.Option(help="Nothing younger is deleted; readers have this long.")] = 168.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what nobody can read any more: old, withdrawn and unfinished generations, files of writers that died.

    Example: `alure vacuum store --keep 7 --dry-run`
    """
    from alure.engine.store import EmbeddingStore
    from alure.engine.store.upkeep import vacuum as vacuum_store

    finish(vacuum_store(EmbeddingStore(store), keep=keep, grace_hours=grace_hours, dry_run=dry_run), as_json)


@app.command()
def export(
    store: StoreArgument,
    to: Annotated[str, typer.Option(help="faiss, parquet, lance or npy.")],
    out: Out,
    flat: Annotated[bool, typer.Option("--flat", help="One row an edge or a candidate instead of one a user.")] = False,
    generation: Annotated[str | None, typer.Option(help="Default: the newest published.")] = None,
    as_json: Json = False,
) -> None:
    """Write a generation for other tools.

    faiss: one index a country with the graph's vectors, clusters and nprobe, so that FAISS finds the same neighbours.

    Example: `alure export store --to parquet --flat --out flat`
    """
    from alure.engine.export import export_store

    finish(export_store(store, to, out, flat=flat, generation=generation), as_json)


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Argument(
            help="attention, encoding, compression, neighbors, online, pagerank, refresh, retrieval or all."
        ),
    ] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, fewer laps.")] = False,
    case: Annotated[
        str | None, typer.Option("--case", help='Only the cases whose name contains this: "equal 1024", "backward".')
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, help="Time for all: fewer laps; the last cases may miss out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Append the results as JSON lines: a .jsonl file, or a folder.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the race of attention or neighbors into this SVG file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Race the kernels and stages beside their peers on this machine, in one run.

    Every implementation is checked against the reference, then timed in turn with the others, round after round.
    One that cannot take part is listed with the reason. OMP_NUM_THREADS=1 races on one thread.

    Example: `alure bench attention --quick`
    """
    command = [sys.executable, "-m", "alure.bench", suite]
    command += ["--quick"] if quick else []
    command += ["--json"] if as_json else []
    for option, value in (("--case", case), ("--minutes", minutes), ("--out", out), ("--plot", plot)):
        command += [option, str(value)] if value else []
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def tune(
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", help="16, 32, 64, 128 or 256; repeatable. [default: 64 128]")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="bfloat16, float16, float32; repeatable. [default: bfloat16]")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="For compiling; timing adds a third.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Find the fastest tiles of the attention kernels on this GPU, and keep them for every job from now on.

    Without it the kernels take tiles that are known to compile well. Results do not depend on it but for the last bits.
    Run it again after an update of Triton.

    Example: `alure tune --head-dim 64`
    """
    command = [sys.executable, "-m", "alure.bench.tune", "--minutes", str(minutes), *(["--json"] if as_json else [])]
    for option, values in (("--head-dim", head_dim), ("--dtype", dtype)):
        command += [word for value in values or [] for word in (option, str(value))]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def profile(
    what: Annotated[str, typer.Argument(help="What to profile: refresh.")],
    model: Annotated[Path, typer.Argument(help="What `alure train` wrote.")],
    events: Annotated[Path, typer.Argument(help="What `alure ingest` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The trace, for ui.perfetto.dev or chrome://tracing.")] = Path(
        "refresh.trace.json"
    ),
    users: Annotated[int, typer.Option(min=1, help="Users to embed under the profiler.")] = 2048,
    as_json: Json = False,
) -> None:
    """Trace a stage and say where its time goes.

    Example: `alure profile refresh model events --out refresh.trace.json`
    """
    from alure.engine.profiling import profile_refresh

    if what != "refresh":
        raise InputError(f"profile: expected refresh, got {what!r}")
    finish(profile_refresh(model, events, out, users), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, which backends will be used and why, and what to install.

    Example: `alure doctor`
    """
    from alure.engine.doctor import examine, render

    findings = examine()
    if as_json:
        finish(findings, as_json)
    else:
        print(render(findings))  # noqa: T201


def main() -> None:
    """Entry point: runs a command and turns what went wrong into a message and an exit code."""
    try:
        with interruptible():
            app()
    except SystemExit as stop:
        usage: Any = stop.__context__
        if isinstance(usage, UsageError):  # typer has printed it
            report_failure(usage.format_message(), EXIT_INPUT)
        elif stop.code == TYPER_INTERRUPTED:
            fail("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
        raise
    except Interrupted as error:
        fail(str(error), EXIT_INTERRUPTED)
    except InputError as error:
        fail(str(error), EXIT_INPUT)
    except (FileExistsError, NotADirectoryError) as error:
        fail(f"{error.filename or error}: there is a file where a folder is expected; name another path", EXIT_INPUT)
    except IsADirectoryError as error:
        fail(f"{error.filename or error}: there is a folder where a file is expected; name another path", EXIT_INPUT)
    except OSError as error:
        if error.errno not in NO_ROOM:
            fail(str(error), EXIT_FAILED)
        reason = f"{error.filename or 'an output'}: cannot be written ({error.strerror})"
        fail(f"{reason}; make room, then run the same command again", EXIT_FAILED)
    except AlureError as error:
        fail(str(error), EXIT_FAILED)
    finally:
        atexit.register(ignore_signals)  # a signal in the last tenths of a second must not change the exit code


def fail(message: str, code: int) -> NoReturn:
    say(f"alure: {message}")
    report_failure(message, code)
    sys.exit(code)


def report_failure(message: str, code: int) -> None:
    """Under --json stdout ends with an object here too."""
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": message, "exit_code": code}))  # noqa: T201


if __name__ == "__main__":  # torchrun -m alure.engine.cli
    main()

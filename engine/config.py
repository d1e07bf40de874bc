"""The configuration of every stage: pydantic models read from YAML, where an unknown key is an error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from alure.engine.errors import InputError, refuse_s3

DAY = 86_400


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _paths_are_local(cls, value: Any, field: ValidationInfo) -> Any:
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                refuse_s3(path, str(field.field_name))
        return value


Made = TypeVar("Made", bound=Section)


def filled(given: dict[str, Any], implied: Mapping[str, Any], make: Callable[[Any], Made]) -> Made:
    """`make` of what was given and, where that is silent, of what it implies.

    Only what was given counts as set: an option of the command line, such as another preset, implies other values.
    """
    made = make({**implied, **given})
    made.model_fields_set.intersection_update(given)
    return made


class EventsConfig(Section):
    """What comes in, and what its columns are called."""

    inputs: list[Path] = Field(default_factory=list, description="Parquet files, folders of them, or Delta tables")
    items: Path | None = Field(None, description="item_id, account_id, category_id, title, dense, semantic_ids")
    social: Path | None = Field(None, description="user_id, followed_id")
    columns: dict[str, str] = Field(default_factory=dict, description="our column name: the input's column name")
    sources: list[str] | None = Field(None, description="the sources to read; others go to quarantine (default: all)")
    ad_sources: list[str] | None = Field(None, description="sources whose items are ads (default: all)")
    latest: int | None = Field(None, description="unix seconds; later events go to quarantine (default: now)")
    max_quarantine_share: float = Field(0.05, ge=0, le=1, description="a larger share of bad rows stops the job")
    memory_limit: str = Field("1GiB", description="of DuckDB's sort and joins; what is larger spills to disk")
    temp_directory: Path | None = Field(None, description="where it spills (default: beside the log)")


class SourceConfig(Section):
    """One source's own module shape, where it differs from the model's."""

    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=1, description="attention reaches this many events to each side")


Encoder = Literal["position", "frequency", "age", "gap", "cyclic"]
ENCODERS: tuple[Encoder, ...] = get_args(Encoder)

PRESETS: dict[str, dict[str, int]] = {
    "small": {"width": 64, "layers": 2, "heads": 4, "seeds": 2, "attribute_width": 32, "hash_rows": 1 << 16},
    "base": {"width": 192, "layers": 4, "heads": 6, "seeds": 4, "attribute_width": 64, "hash_rows": 1 << 19},
    "large": {"width": 512, "layers": 8, "heads": 8, "seeds": 8, "attribute_width": 128, "hash_rows": 1 << 21},
}


class ModelConfig(Section):
    """The user model's shape: one module a source and layer, taps, compression n → k (paper, section 2)."""

    preset: Literal["small", "base", "large"] = "small"
    width: int = Field(64, ge=8, description="d, the width of tokens and of each embedding")
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    seeds: int = Field(2, ge=1, description="learned queries that pool each tap")
    attribute_width: int = Field(32, ge=1, description="width of one attribute's embedding before linear compression")
    hash_rows: int = Field(1 << 16, ge=16, description="rows of the hashed embedding table")
    taps: list[tuple[int, str]] | None = Field(None, description="(layer, source) pairs to pool (default: all)")
    num_embeddings: int = Field(2, ge=1, le=8, description="k, the embeddings a user")
    compression: Literal["dot_linear", "interaction"] = "dot_linear"
    compression_rank: int = Field(8, ge=1, description="r, columns of Y in X(XᵀY)")
    causal: bool = False
    window: int | None = Field(None, ge=1)
    exchange: bool = Field(
        False, description="between layers every source's tokens hear the means of the user's other sources"
    )
    buckets_per_octave: int = Field(2, ge=1, description="time thresholds a doubling")
    max_position: int = Field(1024, ge=1, description="rows of the position table; older events share the last")
    periods: list[int] = Field(
        default=[3_600, 6 * 3_600, DAY, 7 * DAY, 28 * DAY, 365 * DAY], description="seconds, cyclic encoding of events"
    )
    bias_periods: list[int] = Field(default=[DAY, 7 * DAY], description="seconds, cyclic part of the attention bias")
    encoders: list[Encoder] = Field(
        list(ENCODERS), description="the parts of CFEE that are on: order and age count from the snapshot time"
    )
    time_bias: bool = Field(True, description="attention's bias by time difference: table and bias_periods")
    position_bias: bool = Field(True, description="attention's bias by distance in the sequence")
    ad_level: Literal["item", "account"] = Field(
        "item",
        description="what the two-tower head retrieves: items, by their ids and content, or accounts (advertisers), by "
        "their id alone, so that all items of an account have one vector",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of token and branch channels left out while training")
    sources: dict[str, SourceConfig] = Field(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def fill_from_preset(cls, data: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict) and data.get("preset", "small") in PRESETS:
            return filled(data, PRESETS[data.get("preset", "small")], make)
        return make(data)

    @model_validator(mode="after")
    def check_heads(self) -> "ModelConfig":
        for name, heads in [("heads", self.heads), *((f"sources.{s}.heads", c.heads) for s, c in self.sources.items())]:
            if heads and self.width % heads:
                raise ValueError(f"{name}: expected a divisor of width ({self.width}), got {heads}")
        return self

    @model_validator(mode="after")
    def check_exchange(self) -> "ModelConfig":
        if self.exchange and self.causal:
            raise ValueError("exchange: the mean of a source has its later events in it; set causal to false")
        return self


class TaskConfig(Section):
    """A binary task: was an exposure followed by a positive of the same user and item within `window` seconds?"""

    exposure: list[str]
    positive: list[str]
    window: int = DAY
    weight: float = 1.0


class TrainingConfig(Section):
    steps: int | None = Field(None, ge=0, description="default: 4 passes over the users, 120 to 600 steps")
    batch_users: int = Field(128, ge=1)
    learning_rate: float = Field(5e-3, gt=0)
    table_learning_rate: float | None = Field(
        None, gt=0, description="of the hashed table's row-wise Adagrad (default: 50 times learning_rate)"
    )
    weight_decay: float = Field(0.01, ge=0)
    max_events: int = Field(128, ge=1, description="newest events a source that training reads")
    windows: Literal["newest", "random"] = Field(
        "newest",
        description="what is read of a history longer than max_events with labels after every event: its newest "
        "events, or in half of its visits those up to an event drawn uniformly",
    )
    label_horizon: int = Field(7 * DAY, ge=1, description="seconds after the snapshot that hold its positives")
    labels: Literal["all_action", "next_event", "dense_all_action"] = Field(
        "all_action",
        description="what a retrieval positive is. all_action: up to 4 engagements of the label horizon after one "
        "snapshot a user; next_event, dense_all_action: after every event the next one, or one of the horizon's, which "
        "needs a causal model of one source without the encoders position and age",
    )
    embedding_times: Literal["event", "between"] = Field(
        "between",
        description="with labels after every event, T of the embedding after one: the event's own time, or "
        "for half of them a time before the next one, as a scheduled refresh sees",
    )
    held_out: Literal["time", "last_event"] = Field(
        "time", description="for validation: the newest validation_share of the targets, or every user's last event"
    )
    exposures: int = Field(4, ge=0, description="candidate ads a user and snapshot for the binary tasks")
    tasks: dict[str, TaskConfig] | None = Field(None, description="default: ctr and cvr where the events allow")
    target_types: list[str] | None = Field(None, description="event types that are retrieval positives")
    retrieval_weight: float = Field(1.0, ge=0)
    negatives: int = Field(
        256,
        ge=0,
        description="sampled items beside the in-batch negatives; with labels after every event, as many as "
        "there are items or more make the softmax exact",
    )
    in_batch_negatives: int = Field(
        512, ge=0, description="with labels after every event: positives of the batch that are negatives to all others"
    )
    log_q: Literal["negatives", "tfrs", "none"] = Field(
        "negatives", description="log-Q correction: of negatives alone, of the positive too (as TFRS does), or none"
    )
    item_probability: Literal["exact", "streaming"] = Field(
        "exact",
        description="Q of log-Q. exact: counted from the log, of one target a user; streaming: learned from the "
        "positives as they are drawn (Yi et al. 2019), which needs labels all_action",
    )
    view_weight: float = Field(
        0.0, ge=0, description="of the user–user loss: two halves of a user's history are each other's positive"
    )
    temperature: float = Field(0.07, ge=0.01, description="start of the learned temperature; its floor is 0.01")
    validation_share: float = Field(0.1, ge=0, lt=1, description="newest share of the targets, held out for metrics")
    validate_every: int | None = Field(
        None, ge=1, description="steps between validations; the model with the best figure is kept (default: the last)"
    )
    patience: int | None = Field(
        None, ge=1, description="validations in a row without a better figure that end the training (default: any)"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of activations and products; weights, their gradients and losses stay float32"
    )
    tensorboard: Path | None = Field(None, description="folder for TensorBoard's event files")
    threads: int | None = Field(None, ge=1, description="default: 1 up to width 64, else PyTorch's")

    @model_validator(mode="after")
    def check_combinations(self) -> "TrainingConfig":
        if self.held_out == "last_event" and self.labels == "all_action":
            raise ValueError("held_out: last_event needs labels next_event or dense_all_action, got all_action")
        if self.item_probability == "streaming" and self.labels != "all_action":
            raise ValueError(f"item_probability: streaming needs labels all_action, got {self.labels}")
        if self.patience is not None and self.validate_every is None:
            raise ValueError("patience: counts validations on the way; set validate_every too")
        if self.validate_every is not None and self.held_out == "time" and not self.validation_share:
            raise ValueError("validate_every: needs a validation_share above 0")
        return self


OutputDtype = Literal["float32", "float16", "int8"]


class DriftConfig(Section):
    """How far a generation may lie from the one before it; one that misses a threshold is not published."""

    anchors: int = Field(2_000, ge=0, description="users of both generations, those without news first; 0: none")
    k: int = Field(10, ge=1, description="nearest anchors of an anchor that are compared")
    min_cosine: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="of the anchors' embeddings with their earlier ones, mean (default: only reported)",
    )
    min_overlap: float | None = Field(
        None, ge=0, le=1, description="share of the k nearest anchors that stay, mean (default: only reported)"
    )

    @model_validator(mode="after")
    def check_anchors(self) -> "DriftConfig":
        if not self.anchors and (self.min_cosine is not None or self.min_overlap is not None):
            raise ValueError("anchors: thresholds need some, got 0")
        return self

    def reported(self) -> "DriftConfig":
        """The same without thresholds."""
        return self.model_copy(update={"min_cosine": None, "min_overlap": None})


class RefreshConfig(Section):
    token_budget: int | None = Field(
        None,
        ge=1,
        description="events a batch; a longer history is a batch of its own (default: 32,768 on a CPU, 262,144 on a "
        "GPU)",
    )
    unit_users: int = Field(32_768, ge=1, description="users a unit of work: one idempotent write")
    max_events: int | None = Field(None, ge=1, description="newest events a source (default: all)")
    max_age: int | None = Field(None, ge=0, description="seconds; incremental refreshes embed anew what is older")
    max_minutes: float | None = Field(
        None, gt=0, description="for incremental refreshes: who changed most comes first, the rest is carried forward"
    )
    kv_cache: bool = Field(
        False,
        description="keep every event's keys and values beside the store, and of histories that grew since an earlier "
        "generation run new events only; for causal models without the encoders position and age",
    )
    max_quarantine_share: float = Field(
        0.001, ge=0, le=1, description="of users without a finite embedding: left out; a larger share stops the job"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of weights and activations; auto: bfloat16 on GPUs and CPUs that multiply it (AMX, AVX512_BF16), "
        "else float32",
    )
    output_dtype: OutputDtype = Field(
        "float32", description="of the embeddings in the store, one for all its generations; int8: a scale an embedding"
    )
    drift: DriftConfig = DriftConfig()


class GraphConfig(Section):
    """Paper, section 3: k1 = 400 clusters a country, k'1 = 50 searched, k2 = 15 neighbours."""

    nlist: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        400, description="auto: the square root of a country's users, and nprobe auto"
    )
    nprobe: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        50, description="auto: as few as reach recall_target on a sample of the country's users"
    )
    recall_target: float | None = Field(None, gt=0, le=1, description="what nprobe auto aims at (default: 0.95)")
    k: int = Field(15, ge=1)
    average: int = Field(
        1, ge=1, description="newest generations whose embeddings are averaged, all in one space; the store keeps each"
    )
    search: Literal["auto", "faiss", "grouped", "exact"] = "auto"
    exact_below: int = Field(10_000, ge=0, description="countries of fewer users are searched exactly under auto")
    ppr: bool = False
    ppr_alpha: float = Field(0.15, ge=0.001, lt=1, description="restart probability of Personalized PageRank")
    ppr_epsilon: float = Field(
        1e-4, ge=0, le=1, description="walks end below this part of the k-th probability; 0: exact"
    )

    @model_validator(mode="wrap")
    @classmethod
    def fill_auto(cls, data: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict) and data.get("nlist") == "auto":
            return filled(data, {"nprobe": "auto"}, make)
        return make(data)

    @model_validator(mode="after")
    def check_auto(self) -> "GraphConfig":
        if self.nprobe != "auto" and self.nlist == "auto":
            raise ValueError("nlist: with auto, nprobe is measured; leave nprobe out, or give both as numbers")
        if self.nprobe != "auto" and self.recall_target is not None:
            raise ValueError("recall_target: only nprobe auto aims at it; leave it out, or give nprobe as auto")
        return self


class RetrievalConfig(Section):
    cap: int = Field(1500, ge=1)
    graphs: dict[str, float] = Field(
        default={"alure": 1.0, "social": 0.1, "ppr": 0.1}, description="graph: weight in the blend, where present"
    )
    quotas: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="graph: ads it brings to the blend at most (default: cap)"
    )
    engagement: dict[str, float] = Field(
        default={"view": 0.0, "click": 1.0, "conversion": 3.0}, description="event type: weight; others weigh 1"
    )
    half_life: float = Field(7.0 * DAY, gt=0, description="seconds after which an engagement counts half")
    account_weight: float = Field(0.2, ge=0, description="weight of other ads of an engaged account")
    account_items: int = Field(5, ge=0, description="other ads an engaged account brings")
    account_cap: int | None = Field(None, ge=1, description="ads of one account a user gets (default: any number)")
    eligible: Path | None = Field(None, description="item_id[, country]: the ads that may be shown (default: all)")
    cold_items: int = Field(
        1, ge=0, description="eligible ads without an engagement yet that an engaged account brings, in turn"
    )
    exclude_seen: bool = False
    recent_seconds: int = Field(DAY, ge=1, description="online: events after the snapshot count for so long")
    recent_events: int = Field(1 << 20, ge=1, description="online: so many of the newest are kept in memory")


class EvaluationConfig(Section):
    k: list[Annotated[int, Field(ge=1)]] = [10, 50, 200]
    truth: Path | None = Field(None, description="user_id, item_id of future engagements; none: hold out from the log")
    holdout: float = Field(0.1, gt=0, lt=1, description="newest share of the events held out where truth is none")
    truth_types: list[str] | None = Field(
        None, description="event types that count as engagement (default: all but view)"
    )
    bootstrap: int = Field(500, ge=10)
    cold_events: int = Field(10, ge=0, description="users with at most so many events up to the snapshot are cold")


class SemanticsConfig(Section):
    """Codebooks of semantic ids: `alure quantize train`. TIGER (Rajput et al. 2023) has 3 levels of 256 codes."""

    method: Literal["rqvae", "kmeans"] = Field("rqvae", description="kmeans: residual k-means, without a network")
    levels: int = Field(3, ge=1, le=16)
    codebook: int | None = Field(
        None, ge=2, le=65_536, description="codes a level (default: about a 48th of the items, a power of 2, 8 to 256)"
    )
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field((256, 128), description="rqvae: widths of the encoder")
    latent: int = Field(32, ge=1, description="rqvae: width of what is quantised")
    beta: float = Field(0.25, ge=0, description="rqvae: weight of the commitment loss")
    steps: int = Field(1_000, ge=1, description="rqvae: training steps")
    batch_size: int = Field(512, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    holdout_share: float = Field(0.1, gt=0, lt=1, description="of the vectors: only measured, not learned from")
    max_vectors: int = Field(200_000, ge=2, description="vectors drawn for training; more of the items are left out")
    threads: int = Field(1, ge=1, description="of the CPU; one number of them gives one result, and small steps want 1")


class Config(Section):
    """A whole run: `alure run CONFIG.yaml`."""

    output: Path = Field(Path("alure-output"), description="folder that gets everything the run writes")
    name: str = ""
    seed: int = 0
    as_of: int | None = Field(
        None, description="snapshot time T, unix seconds (default: the end of what is not held out)"
    )
    events: EventsConfig = EventsConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    refresh: RefreshConfig = RefreshConfig()
    graph: GraphConfig = GraphConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def load(cls, path: Path | str, data: Path | str | None = None) -> "Config":
        """Read YAML. Relative paths start from the file's folder, those of inputs from `data` where it is given.

        Raises InputError where there is no such file, and names every key that is unknown or has a wrong value.
        """
        path = Path(path)
        try:
            config = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise InputError(describe(error, path)) from None
        home = path.resolve().parent
        inputs = home if data is None else Path(data).resolve()
        events, truth, eligible = config.events, config.evaluation.truth, config.retrieval.eligible
        board = config.training.tensorboard
        found = {
            "inputs": [inputs / file for file in events.inputs],
            "items": events.items and inputs / events.items,
            "social": events.social and inputs / events.social,
            "temp_directory": events.temp_directory and home / events.temp_directory,
        }
        return config.model_copy(
            update={
                "output": home / config.output,
                "events": events.model_copy(update=found),
                "training": config.training.model_copy(update={"tensorboard": board and home / board}),
                "retrieval": config.retrieval.model_copy(update={"eligible": eligible and inputs / eligible}),
                "evaluation": config.evaluation.model_copy(update={"truth": truth and inputs / truth}),
            }
        )


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = Loader(path.read_text()).get_single_data()
    except FileNotFoundError:
        raise InputError(f"configuration: {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"configuration: expected a YAML file, got the folder {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"configuration: {path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"configuration: expected a mapping in {path}, got {type(data).__name__}")
    return data


def describe(error: ValidationError, where_from: Path | str) -> str:
    """pydantic's findings, one line each, in our words."""
    lines = [f"configuration: {where_from} not valid:"]
    for finding in error.errors():
        where = ".".join(str(part) for part in finding["loc"]) or "(top)"
        if finding["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown key; `alure run --schema` prints the known ones")
        elif finding["type"] == "value_error":
            lines.append(f"  {where}: {finding['ctx']['error']}")  # our own words, which say what came
        else:
            lines.append(f"  {where}: {finding['msg']}, got {finding.get('input')!r}")
    return "\n".join(lines)

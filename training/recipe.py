"""A training run as a TOML file; unknown keys and impossible values are errors."""

import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from engine.config import ModelConfig, config_from_dict
from engine.errors import ConfigError
from training.upcycling_files import open_model_source

OptimizerName = Literal["adamw", "adafactor", "adafactor_hf", "muon"]
ObjectiveName = Literal["spans", "prefix_lm", "ul2"]
InheritSchedule = Literal["linear", "heaviside", "constant"]
ScheduleName = Literal["constant", "linear", "noam", "wsd"]
Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe:
    """A pair of text files, one document per line, and how often it is drawn against the others.

    Sources of one `group`, such as a language, are also evaluated together, apart from the rest.
    """

    train: str
    valid: str
    weight: float = 1.0
    group: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight is {self.weight}; it must be above 0, and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Where the text is and how it becomes rows.

    Lengths in tokens, paths relative to the recipe. `objective` spans fills blanks and continues
    the text of `continuation_share`; prefix_lm continues all; ul2 mixes denoisers of seven kinds.
    """

    tokenizer: str
    sources: tuple[SourceRecipe, ...]
    shards: str = "shards"
    source_length: int = 512
    target_length: int = 256
    window: int = 512
    density: float = 0.15
    mean_span: float = 10.0
    continuation_share: float = 0.0
    objective: ObjectiveName = "spans"

    def __post_init__(self) -> None:
        if self.objective != "spans" and self.continuation_share:
            raise ConfigError(
                f"continuation_share is {self.continuation_share}; it belongs to objective spans"
            )
        if not self.sources:
            raise ConfigError("[[data.sources]] is empty; name at least one pair of text files")
        if not 16 <= self.window <= self.source_length:
            raise ConfigError(
                f"window is {self.window}; allowed: 16 to source_length {self.source_length}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """How long and how fast. One step = `accumulation` micro-batches of `rows` packed rows.

    `balanced_until` is the share of the steps routed by balanced assignment; afterwards routing is
    greedy, as at inference. Half was as good as none, and balanced to the end was worse, by 0.002
    to 0.03 nat (docs/inheritance). `warmup` and `decay` are shares of the steps. `start` is a model
    directory to begin with, such as a grown one, relative to the recipe; then [model] may be left
    out. None begins at random.

    `ema` averages the weights of all steps, forgetting by that factor a step; the average is what
    is evaluated and written. `checkpointing` computes blocks again in the backward pass instead of
    keeping what they computed. `z_loss` keeps the logits' normaliser near 1; `balance_loss` and
    `router_z_loss` do that for a router that is trained (base_layer, softmax, sigmoid).
    `router_noise` (standard deviation) moves tokens to other experts, `expert_drop` leaves experts'
    outputs out at random.
    For the share `submodel_until` of the steps each trains a lower part of the model, drawn anew:
    the top `submodel_layers` of the lowest so many layers of each stack, or of twice as many, and
    so on (bert2BERT's first stage, for a model that was made deeper).
    Of several processes `expert_parallel` share the experts, and send tokens to each other.
    """

    steps: int
    start: str = ""
    rows: int = 16
    accumulation: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    schedule: ScheduleName = "wsd"
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Precision = "bf16"
    balanced_until: float = 0.5
    seed: int = 1
    eval_every: int = 500
    eval_batches: int = 8
    checkpoint_every: int = 500
    ema: float = 0.0
    checkpointing: bool = False
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    router_noise: float = 0.0
    expert_drop: float = 0.0
    expert_parallel: int = 1
    submodel_until: float = 0.0
    submodel_layers: int = 3

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "rows",
            "accumulation",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "expert_parallel",
            "submodel_layers",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup", "decay", "balanced_until", "submodel_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to 1 (a share)")
        if not 0 < self.learning_rate < math.inf or not self.clip > 0 or not self.weight_decay >= 0:
            raise ConfigError("learning_rate and clip must be above 0, weight_decay not below 0")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        self._check_options()

    def _check_options(self) -> None:
        for name in ("ema", "expert_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to less than 1")
        for name in ("z_loss", "balance_loss", "router_z_loss", "router_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """Knowledge inheritance: the loss is (1 - rate) CE + rate temperature^2 KL(teacher, student).

    `teachers` are model directories or run folders; several teach their mean. The rate starts at
    `rate` and is 0 after `inherit_share` of the steps: linear falls to it, heaviside and constant
    drop to it. `top_k` keeps the likeliest tokens of the teachers only (0: all); a `cache` folder
    keeps them on disk. With `stop_when_passed` the teaching ends at the first evaluation at which
    the student is as good as the teachers.

    Source: Qin et al. (arXiv:2105.13880) s3.
    """

    teachers: tuple[str, ...]
    schedule: InheritSchedule = "linear"
    rate: float = 1.0
    inherit_share: float = 0.4
    temperature: float = 2.0
    top_k: int = 0
    cache: str = ""
    stop_when_passed: bool = True

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ConfigError("teachers is empty; name a model directory or a run folder")
        for name in ("rate", "inherit_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0, and finite")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if self.cache and not self.top_k:
            raise ConfigError("cache needs top_k, the number of tokens kept at each position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run: the model, the data, the training, and whom it learns from."""

    model: ModelConfig
    data: DataRecipe
    train: TrainRecipe
    folder: Path
    distill: DistillRecipe | None = None

    def __post_init__(self) -> None:
        train, config = self.train, self.model
        if not config.num_experts and (train.router_noise or train.expert_drop):
            raise ConfigError("router_noise and expert_drop need a model with experts")
        if config.num_experts and config.is_top_k and train.router_noise:
            raise ConfigError(
                f"router_noise is for routers that take one expert per token, not {config.router}"
            )
        is_trained = config.router == "base_layer" or config.is_top_k
        has_router = config.num_experts and is_trained
        if (train.balance_loss or train.router_z_loss) and not has_router:
            raise ConfigError(
                "balance_loss and router_z_loss teach a router; cpm_2 and default are not trained"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        train, config = self.train, self.model
        parallel = train.expert_parallel
        if parallel > 1 and (not config.num_experts or config.num_experts % parallel):
            raise ConfigError(
                f"expert_parallel is {parallel}; it must divide num_experts, {config.num_experts}"
            )
        layers = max(config.num_encoder_layers, config.num_decoder_layers)
        if train.submodel_until and train.submodel_layers > layers:
            raise ConfigError(f"submodel_layers is {train.submodel_layers}; the model has {layers}")

    def path(self, name: str) -> Path:
        """A path of the recipe, relative to the folder of its file."""
        return self.folder / name

    def as_run(self) -> dict[str, Any]:
        """The whole recipe with all defaults, for the record of the run."""
        names = ("model", "data", "train", *(["distill"] if self.distill else []))
        tables = {name: asdict(getattr(self, name)) for name in names}
        return {"folder": str(self.folder.resolve()), **tables}


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises ConfigError that names the file and the key if anything is unknown, missing or
    impossible.
    """
    return parse_recipe(path, read_tables(path))


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error


def parse_recipe(path: Path, tables: dict[str, Any]) -> Recipe:
    """Check the tables of a recipe; `path` is its file. Raises ConfigError as `read_recipe`."""
    if set(tables) - {"distill", "model"} != {"data", "train"}:
        raise ConfigError(f"{path}: tables are {sorted(tables)}; needed: model, data, train")
    try:
        model = _check_table(tables["model"], "model") if "model" in tables else None
        data = _check_table(tables["data"], "data")
        sources = data.pop("sources", [])
        if not isinstance(sources, list):
            raise ConfigError("data.sources is no list; write [[data.sources]]")
        data["sources"] = tuple(build_table(SourceRecipe, item, "data.sources") for item in sources)
        train = build_table(TrainRecipe, tables["train"], "train")
        return Recipe(
            model=_read_model(path.parent, model, train.start),
            data=build_table(DataRecipe, data, "data"),
            train=train,
            folder=path.parent,
            distill=_build_distill(tables.get("distill")),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_model(folder: Path, values: dict[str, Any] | None, start: str) -> ModelConfig:
    """The model of [model]; without one, that of the directory to start from."""
    if values is not None:
        return config_from_dict(values)
    if not start:
        raise ConfigError("there is no table [model]; without one, [train] needs a start")
    return open_model_source(folder / start).config


def _build_distill(values: object) -> DistillRecipe | None:
    if values is None:
        return None
    table = _check_table(values, "distill")
    teachers = table.get("teachers", [])
    if not isinstance(teachers, list) or not all(isinstance(name, str) for name in teachers):
        raise ConfigError(f"[distill] teachers is {teachers!r}; expected a list of folders")
    if teachers or "teachers" in table:
        table["teachers"] = tuple(teachers)
    return build_table(DistillRecipe, table, "distill")


def _check_table(values: object, name: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is {values!r}; expected a table [{name}]")
    return dict(values)


def build_table(kind: type[T], values: object, table: str) -> T:
    """A frozen dataclass from a TOML table. Raises ConfigError that names the key at fault."""
    values = _check_table(values, table)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known.keys()):
        raise ConfigError(
            f"[{table}] has unknown keys {', '.join(unknown)}; known: {', '.join(known)}"
        )
    needed = [name for name, field in known.items() if field.default is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"[{table}] lacks {', '.join(missing)}")
    for key, value in values.items():
        _check_type(f"[{table}] {key}", known[key].type, value)
    return kind(**values)


def _check_type(where: str, expected: Any, value: object) -> None:
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ConfigError(f"{where} is {value!r}; allowed: {', '.join(get_args(expected))}")
    elif expected in (int, float, str, bool):
        allowed = (int, float) if expected is float else (expected,)
        wrong_bool = isinstance(value, bool) and expected is not bool
        if wrong_bool or not isinstance(value, allowed):
            raise ConfigError(f"{where} is {value!r}; expected {expected.__name__}")

"""Named recipes of growth, and growth plans as TOML files.

Source: Net2Net (arXiv:1511.05641); StackingBERT (ICML 2019); bert2BERT (arXiv:2110.07143).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from engine.config import ModelConfig, TokenizerKind, config_from_dict
from engine.errors import ConfigError
from training.growth import GrowthPlan
from training.growth_depth import DepthMethod
from training.growth_width import Split, WidthMethod
from training.upcycling import LayerChoice, RouterStart, Upcycling
from training.vocabulary_growth import RowStart
from training.vocabulary_names import find_kind

RecipeName = Literal["net2net", "stacking_bert", "bert2bert"]
RECIPES: dict[str, dict[str, Any]] = {
    "net2net": {"width": "fpi", "noise": 0.01, "depth": "identity"},
    "stacking_bert": {"depth": "stack"},
    "bert2bert": {"width": "aki", "depth": "stack"},
}
TABLES = ("target", "growth", "experts", "vocabulary")
CHOICES: dict[str, tuple[str, ...]] = {
    "width": get_args(WidthMethod),
    "split": get_args(Split),
    "depth": get_args(DepthMethod),
    "router_start": get_args(RouterStart),
    "layers": get_args(LayerChoice),
    "kind": get_args(TokenizerKind),
    "start": get_args(RowStart),
    "recipe": get_args(RecipeName),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTarget:
    """Another vocabulary: a folder of tokenizer files, their kind, how new tokens start."""

    tokenizer: str
    kind: TokenizerKind
    start: RowStart = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFile:
    """What a growth file asks for; `target` holds the fields of the model that change."""

    path: Path
    target: Mapping[str, Any]
    growth: Mapping[str, Any] = field(default_factory=dict)
    experts: Upcycling = field(default_factory=Upcycling)
    vocabulary: VocabularyTarget | None = None

    def plan(self, config: ModelConfig) -> GrowthPlan:
        """The plan for a model, whose config (with the new vocabulary, if any) is given.

        Raises ConfigError if a field is unknown or impossible.
        """
        try:
            known = {f.name: getattr(config, f.name) for f in fields(config)}
            target = config_from_dict(known | dict(self.target))
            return GrowthPlan(target=target, experts=self.experts, **self.growth)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error


def read_target(path: Path) -> TargetFile:
    """Read a growth file. Raises ConfigError that names file and key if it cannot be understood."""
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return _parse(path, tables)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def mixture_target(num_experts: int) -> TargetFile:
    """What makes a dense model a mixture as Mixtral is: two experts of a token, exact at first."""
    return TargetFile(path=Path("--experts"), target=_mixture(num_experts))


def sizes_target(
    source: ModelConfig,
    sizes: Mapping[str, int],
    layers: int | None = None,
    experts: int | None = None,
    vocabulary: Path | None = None,
) -> TargetFile:
    """What options ask for: widths by field, layers of each stack, experts, a vocabulary.

    All of it by the operators that are exact. Raises TokenizerError if the folder of the vocabulary
    holds none.
    """
    target: dict[str, Any] = dict(sizes)
    if layers is not None:
        stacks = ("decoder",) if source.is_decoder_only else ("encoder", "decoder")
        target |= {f"num_{stack}_layers": layers for stack in stacks}
    if experts is not None:
        target |= _mixture(experts)
    wanted = None
    if vocabulary is not None:
        wanted = VocabularyTarget(tokenizer=str(vocabulary), kind=find_kind(vocabulary))
    return TargetFile(path=Path("options"), target=target, vocabulary=wanted)


def _mixture(num_experts: int) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "num_experts_per_token": min(2, num_experts),
        "router": "softmax",
        "normalize_gates": True,
    }


def doublings(layers: int, target: int) -> list[int]:
    """Depths of a progressive run of StackingBERT, which trains at each: 3 to 12 is 3, 6, 12.

    Raises ConfigError if the target is no such multiple.
    """
    depths = [layers]
    while depths[-1] < target:
        depths.append(depths[-1] * 2)
    if depths[-1] != target:
        raise ConfigError(
            f"{layers} layers doubled become {depths[-1]}, not {target}; "
            f"choose {depths[-1]} or {depths[-2]}"
        )
    return depths


def progressive_targets(source: ModelConfig, target: ModelConfig) -> list[ModelConfig]:
    """The configs of a progressive run of StackingBERT, the source first.

    Raises ConfigError if the stacks do not double in the same number of steps.
    """
    encoder = doublings(source.num_encoder_layers, target.num_encoder_layers)
    decoder = doublings(source.num_decoder_layers, target.num_decoder_layers)
    if len(encoder) != len(decoder):
        raise ConfigError(
            f"the encoder doubles {len(encoder) - 1} times, the decoder {len(decoder) - 1}; "
            "progressive stacking doubles both together"
        )
    pairs = list(zip(encoder, decoder, strict=True))[1:]
    stages = [replace(target, num_encoder_layers=e, num_decoder_layers=d) for e, d in pairs]
    return [source, *stages]


def _parse(path: Path, tables: dict[str, Any]) -> TargetFile:
    if unknown := sorted(tables.keys() - set(TABLES)):
        raise ConfigError(f"unknown tables {', '.join(unknown)}; known: {', '.join(TABLES)}")
    for name in tables:
        if not isinstance(tables[name], dict):
            raise ConfigError(f"{name} is {tables[name]!r}; expected a table [{name}]")
    growth = _check("growth", tables.get("growth", {}), (*GROWTH_KEYS, "recipe"))
    named = RECIPES[growth.pop("recipe")] if "recipe" in growth else {}
    experts = _check("experts", tables.get("experts", {}), _keys(Upcycling))
    vocabulary = None
    if "vocabulary" in tables:
        values = _check("vocabulary", tables["vocabulary"], _keys(VocabularyTarget))
        if missing := [key for key in ("tokenizer", "kind") if key not in values]:
            raise ConfigError(f"[vocabulary] lacks {', '.join(missing)}")
        vocabulary = VocabularyTarget(**values)
    return TargetFile(
        path=path,
        target=tables.get("target", {}),
        growth=named | growth,
        experts=Upcycling(**experts),
        vocabulary=vocabulary,
    )


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


GROWTH_KEYS = ("width", "split", "noise", "depth", "seed")
NUMBERS: dict[str, tuple[type, ...]] = {
    "noise": (int, float),
    "drop": (int, float),
    "seed": (int,),
    "tokenizer": (str,),
}


def _check(table: str, values: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigError(
            f"[{table}] has unknown keys {', '.join(unknown)}; known: {', '.join(known)}"
        )
    for key, value in values.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise ConfigError(f"[{table}] {key} is {value!r}; allowed: {', '.join(CHOICES[key])}")
        if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, NUMBERS[key])):
            raise ConfigError(f"[{table}] {key} is {value!r}; expected {NUMBERS[key][-1].__name__}")
    return dict(values)

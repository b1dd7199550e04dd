"""What a model is: sizes, variants and special ids, as the native `config.json` tells."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from engine.errors import ConfigError

Stack = Literal["encoder", "decoder"]
Activation = Literal["gelu_tanh", "relu"]
Router = Literal["cpm_2", "base_layer", "default"]
TokenizerKind = Literal["cpm2_zh", "cpm2_zh_en", "sentencepiece", "bytes"]

FORMAT_VERSION = 1
LENGTH_FACTOR = 4  # relative positions reach further than training did, but not without end


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and variants of one encoder-decoder of the T5 family. Widths in elements.

    `num_experts` 0 means dense; otherwise every feed-forward of both stacks is a MoE layer, routed
    by `router` (cpm_2, base_layer, default: the variants of InfMoE). `scale_logits` multiplies the
    last hidden state by d_model ** -0.5 (T5 v1.0). `max_positions` is the longest encoder input
    that the model was trained on; relative positions set no hard limit. `continuation_sentinel` is
    the index of the sentinel that ends an encoder text to be continued (0 CPM-2, -1 the last one:
    CPM-2.1), None for a model that takes the text as it is and closes it with the first of
    `eos_token_ids` (T5).

    Source: CPM-2 (arXiv:2106.10715) table 1; T5 (arXiv:1910.10683).
    """

    vocab_size: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_experts: int = 0
    router: Router = "cpm_2"
    activation: Activation = "gelu_tanh"
    gated: bool = True
    tied_embeddings: bool = False
    scale_logits: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_eps: float = 1e-6
    max_positions: int = 512
    tokenizer: TokenizerKind = "cpm2_zh_en"
    pad_token_id: int = 5
    decoder_start_token_id: int = 1
    eos_token_ids: tuple[int, ...] = ()
    continuation_sentinel: int | None = 0

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if isinstance(self.num_experts, bool) or self.num_experts < 0 or self.num_experts == 1:
            raise ConfigError(
                f"num_experts is {self.num_experts!r}; it must be 0 (dense) or at least 2"
            )
        if not 0 < self.norm_eps < 1:  # NaN fails as well
            raise ConfigError(f"norm_eps is {self.norm_eps!r}; it must lie between 0 and 1")
        if self.relative_buckets % 4 or self.relative_max_distance <= self.relative_buckets // 2:
            raise ConfigError(
                f"relative_buckets {self.relative_buckets} must divide by 4 and its half lie below "
                f"relative_max_distance {self.relative_max_distance}"
            )
        self._check_ids()

    def _check_ids(self) -> None:
        ids = (self.pad_token_id, self.decoder_start_token_id, *self.eos_token_ids)
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}"
                )

    def num_layers(self, stack: Stack) -> int:
        """Number of blocks of a stack."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    def moe_layers(self) -> list[str]:
        """Names of the MoE layers in order of computation: 'encoder-0', ..., 'decoder-0', ..."""
        if not self.num_experts:
            return []
        stacks: tuple[Stack, ...] = ("encoder", "decoder")
        return [f"{stack}-{i}" for stack in stacks for i in range(self.num_layers(stack))]

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one expert, in their order inside a blob."""
        wide = (self.d_ff, self.d_model)
        shapes: dict[str, tuple[int, ...]] = {"norm": (self.d_model,), "wi_0": wide}
        if self.gated:
            shapes["wi_1"] = wide
        shapes["wo"] = (self.d_model, self.d_ff)
        return shapes

    def to_json(self) -> str:
        """Text of `config.json`."""
        return (
            json.dumps({"format": "infmoe", "version": FORMAT_VERSION, **asdict(self)}, indent=2)
            + "\n"
        )


POSITIVE_FIELDS = (
    "vocab_size",
    "d_model",
    "d_ff",
    "d_kv",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "relative_buckets",
    "relative_max_distance",
    "max_positions",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "router": get_args(Router),
    "activation": get_args(Activation),
    "tokenizer": get_args(TokenizerKind),
}


def config_from_dict(values: dict[str, object]) -> ModelConfig:
    """Build a config from the content of `config.json`.

    Raises ConfigError if a key is unknown or missing, or a value has the wrong type.
    """
    values = {key: value for key, value in values.items() if key not in ("format", "version")}
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(ModelConfig)
    for key, value in values.items():
        expected = {int: (int,), float: (int, float), bool: (bool,)}.get(hints[key])
        wrong_bool = isinstance(value, bool) and hints[key] is not bool
        if expected and (wrong_bool or not isinstance(value, expected)):
            raise ConfigError(f"{key} is {value!r}; expected {hints[key].__name__}")
    sentinel = values.get("continuation_sentinel", 0)
    if sentinel is not None and type(sentinel) is not int:
        raise ConfigError(f"continuation_sentinel is {sentinel!r}; expected a whole number or null")
    eos = values.get("eos_token_ids", ())
    if not isinstance(eos, (list, tuple)) or not all(type(item) is int for item in eos):
        raise ConfigError(f"eos_token_ids is {eos!r}; expected a list of token ids")
    values["eos_token_ids"] = tuple(eos)
    try:
        return ModelConfig(**values)  # type: ignore[arg-type]  # checked above
    except TypeError as error:  # a required key is missing
        raise ConfigError(str(error).removeprefix("ModelConfig.__init__() ")) from error


def read_config(path: Path) -> ModelConfig:
    """Read `config.json` of a native model directory.

    Raises ConfigError if the file is missing, no JSON, of another format or of a later version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != "infmoe":
        raise ConfigError(f'{path}: not a native config: no "format": "infmoe"')
    if values.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: version {values.get('version')!r} is not {FORMAT_VERSION}; "
            "upgrade InfMoE or convert again"
        )
    try:
        return config_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


CPM2_11B = ModelConfig(
    vocab_size=26240,
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_encoder_layers=24,
    num_decoder_layers=24,
    tokenizer="cpm2_zh",
    eos_token_ids=(7,),
)
CPM2_MOE_198B = ModelConfig(
    vocab_size=51968,
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_encoder_layers=24,
    num_decoder_layers=24,
    num_experts=32,
    eos_token_ids=(8,),
)
PRESETS = {"cpm2-11b": CPM2_11B, "cpm2-moe-198b": CPM2_MOE_198B}

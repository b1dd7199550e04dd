"""What a model is: sizes, variants and special ids, as the native `config.json` tells."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from engine.config_parts import LatentAttention, Rotary, check_matrix, read_part
from engine.errors import ConfigError

Stack = Literal["encoder", "decoder"]
Activation = Literal["gelu_tanh", "relu", "gelu", "silu", "clamped_swiglu"]
Router = Literal["cpm_2", "base_layer", "default", "softmax", "sigmoid", "sparsemixer"]
TokenizerKind = Literal["cpm2_zh", "cpm2_zh_en", "sentencepiece", "bytes", "tokenizer_json", "cpm1"]
Norm = Literal["rms", "layer"]
Positions = Literal["relative", "rotary", "learned", "sinusoidal"]
QueryKeyNorm = Literal["none", "head", "width"]

FORMAT_VERSION = 1
MAX_LAYERS = 10_000
MAX_EXPERTS = 1_000_000  # of all layers; a Switch Transformer of 1.6e12 parameters has 30,720
LENGTH_FACTOR = 4  # relative positions reach further than training did, but not without end


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and variants of one transformer. Widths in elements.

    `num_encoder_layers` 0 means decoder-only: the prompt is read by the decoder itself.
    `num_experts` 0 means dense; otherwise every feed-forward, but those of `dense_layers`
    ('decoder-0'), is a MoE layer, routed by `router` (cpm_2, base_layer, default: the variants of
    InfMoE, top-1; softmax, sigmoid, sparsemixer: `num_experts_per_token` experts weighed by their
    gates, `engine/model/topk.py`). `scale_logits` multiplies the
    last hidden state by d_model ** -0.5 (T5 v1.0). `max_positions` is the longest encoder input
    that the model was trained on; relative positions set no hard limit. `continuation_sentinel` is
    the index of the sentinel that ends an encoder text to be continued (0 CPM-2, -1 the last one:
    CPM-2.1), None for a model that takes the text as it is and closes it with the first of
    `eos_token_ids` (T5). A decoder-only model has none; it reads `begin_token_ids` before a text.

    `num_kv_heads` 0: as many as heads. `attention_scale` multiplies queries by keys. `norm_bias`,
    `qkv_bias`, `out_bias`, `ff_bias`, `head_bias`, `router_bias`: whether those products have
    biases; `expert_bias` for experts. `windows`: positions that each decoder layer looks back, 0
    for all; empty: all. `attention_sinks`: a learned score per head that takes a share of attention
    and gives nothing. `expert_d_ff` 0: `d_ff`. `shared_d_ff`: width of the expert that all tokens
    go through beside the routed ones, 0 for none; `shared_gate` weighs it by a sigmoid.
    `choice_bias` is added to scores for choosing experts only; they are chosen among the best
    `top_groups` of `expert_groups`. `normalize_gates` makes the chosen gates sum to 1, then
    `routed_scale` multiplies them.

    `max_model_len` is for serving: the longest prompt that is accepted, with its answer if there is
    no encoder; 0: as long as `max_positions` allows. It is no trait of the model. `long_rotary`
    takes the place of `rotary` where texts of up to `long_positions` are to be read.
    `answer_begin_ids` are what answers begin with where a request does not say.

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
    positions: Positions = "relative"
    rotary: Rotary | None = None
    position_offset: int = 0
    norm: Norm = "rms"
    norm_bias: bool = False
    embedding_scale: float = 1.0
    num_kv_heads: int = 0
    attention_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    query_key_norm: QueryKeyNorm = "none"
    clip_qkv: float = 0.0
    windows: tuple[int, ...] = ()
    attention_sinks: bool = False
    latent: LatentAttention | None = None
    ff_bias: bool = False
    head_bias: bool = False
    dense_layers: tuple[str, ...] = ()
    num_experts_per_token: int = 1
    expert_d_ff: int = 0
    expert_bias: bool = False
    shared_d_ff: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    choice_bias: bool = False
    router_jitter: float = 0.01
    normalize_gates: bool = False
    routed_scale: float = 1.0
    expert_groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    begin_token_ids: tuple[int, ...] = ()
    max_model_len: int = 0
    long_rotary: Rotary | None = None
    long_positions: int = 0
    answer_begin_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (*POSITIVE_FIELDS, *COUNT_FIELDS):
            value, least = getattr(self, name), int(name in POSITIVE_FIELDS)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )
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
        widths = (self.vocab_size, self.d_ff, self.shared_d_ff, self.num_heads * self.d_kv)
        experts = self.num_experts * self.expert_width
        for width in (*widths, experts, self.max_positions, self.long_positions):
            check_matrix(width, self.d_model)
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        if (self.positions == "rotary") != (self.rotary is not None):
            raise ConfigError(f"positions is {self.positions!r}, but rotary is {self.rotary!r}")
        if (self.long_rotary is not None) != (self.long_positions > 0):
            raise ConfigError("long_rotary and long_positions: one is there without the other")
        if self.is_decoder_only and self.positions == "relative":
            raise ConfigError("a decoder-only model has rotary, learned or sinusoidal positions")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}"
            )
        if self.rotary is not None and self.rotary.width > self.d_kv:
            raise ConfigError(
                f"rotary width is {self.rotary.width}; it must be at most d_kv, {self.d_kv}"
            )
        if self.windows and len(self.windows) != self.num_decoder_layers:
            raise ConfigError(
                f"windows has {len(self.windows)} numbers for {self.num_decoder_layers} layers"
            )
        latent, rotary = self.latent, self.rotary
        if latent is not None and (
            rotary is None
            or latent.plain_width + rotary.width != self.d_kv
            or latent.value_width > self.d_kv
            or self.kv_heads != self.num_heads
        ):
            raise ConfigError(
                f"latent attention: plain_width {latent.plain_width} and the rotary width must sum "
                f"to d_kv, {self.d_kv}, value_width {latent.value_width} lie within it, and each "
                "head has keys of its own"
            )

    def _check_experts(self) -> None:
        for name in ("num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) > MAX_LAYERS:  # of a damaged file: lists are made of them
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: up to {MAX_LAYERS}")
        if unknown := sorted({*self.dense_layers} - {*self._all_layers()}):
            raise ConfigError(f"dense_layers names {unknown[0]!r}, which is no layer")
        if not self.num_experts:
            return
        if (in_all := self.num_experts * len(self._all_layers())) > MAX_EXPERTS:
            raise ConfigError(f"there are {in_all} experts in all layers; allowed: {MAX_EXPERTS}")
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_token is {self.num_experts_per_token}; "
                f"allowed: 1 to {self.num_experts}"
            )
        if not self.is_top_k and self.num_experts_per_token != 1:
            raise ConfigError(f"router {self.router!r} takes one expert per token")
        groups, best, taken = self.expert_groups, self.top_groups, self.num_experts_per_token
        if (
            self.num_experts % groups
            or best > groups
            or taken > best * (self.num_experts // groups)
        ):
            raise ConfigError(
                f"expert_groups {groups} must divide num_experts {self.num_experts}, top_groups "
                f"{best} be at most that and hold the {taken} experts of a token"
            )

    def _check_ids(self) -> None:
        ids = (
            self.pad_token_id,
            self.decoder_start_token_id,
            *self.eos_token_ids,
            *self.begin_token_ids,
            *self.answer_begin_ids,
        )
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}"
                )

    def num_layers(self, stack: Stack) -> int:
        """Number of blocks of a stack."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    @property
    def is_decoder_only(self) -> bool:
        """Whether there is no encoder: the decoder reads the prompt itself."""
        return not self.num_encoder_layers

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def is_top_k(self) -> bool:
        """Whether experts are weighed by gates, and the norm is the layer's and not theirs."""
        return self.router in ("softmax", "sigmoid", "sparsemixer")

    @property
    def expert_width(self) -> int:
        """Feed-forward width of an expert."""
        return self.expert_d_ff or self.d_ff

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, soft prompt included, that is accepted."""
        most = self.max_positions * (1 if self.is_decoder_only else LENGTH_FACTOR)
        return min(most, self.max_model_len or most)

    def _all_layers(self) -> list[str]:
        stacks: tuple[Stack, ...] = ("encoder", "decoder")
        return [f"{stack}-{i}" for stack in stacks for i in range(self.num_layers(stack))]

    def moe_layers(self) -> list[str]:
        """Names of the MoE layers in order of computation: 'encoder-0', ..., 'decoder-0', ..."""
        if not self.num_experts:
            return []
        return [layer for layer in self._all_layers() if layer not in self.dense_layers]

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one expert, in their order inside a blob."""
        width = self.expert_width
        wide = (width, self.d_model)
        shapes: dict[str, tuple[int, ...]] = {} if self.is_top_k else {"norm": (self.d_model,)}
        shapes["wi_0"] = wide
        if self.gated:
            shapes["wi_1"] = wide
        shapes["wo"] = (self.d_model, width)
        if self.expert_bias:
            shapes["bi_0"] = (width,)
            if self.gated:
                shapes["bi_1"] = (width,)
            shapes["bo"] = (self.d_model,)
        return shapes

    def to_json(self) -> str:
        """Text of `config.json`."""
        values = {"format": "infmoe", "version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, indent=2) + "\n"


POSITIVE_FIELDS = (
    "vocab_size",
    "d_model",
    "d_ff",
    "d_kv",
    "num_heads",
    "num_decoder_layers",
    "num_experts_per_token",
    "expert_groups",
    "top_groups",
    "relative_buckets",
    "relative_max_distance",
    "max_positions",
)
COUNT_FIELDS = (
    "num_encoder_layers",
    "num_kv_heads",
    "expert_d_ff",
    "shared_d_ff",
    "position_offset",
    "max_model_len",
    "long_positions",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "router": get_args(Router),
    "activation": get_args(Activation),
    "tokenizer": get_args(TokenizerKind),
    "positions": get_args(Positions),
    "norm": get_args(Norm),
    "query_key_norm": get_args(QueryKeyNorm),
    "group_score": ("best", "best_two"),
}
LISTS: dict[str, type] = {
    "eos_token_ids": int,
    "begin_token_ids": int,
    "answer_begin_ids": int,
    "windows": int,
    "dense_layers": str,
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
    for key, item_kind in LISTS.items():
        items = values.get(key, ())
        if not isinstance(items, (list, tuple)) or not all(
            type(item) is item_kind for item in items
        ):
            what = "token ids" if key.endswith("ids") else item_kind.__name__
            raise ConfigError(f"{key} is {items!r}; expected a list of {what}")
        values[key] = tuple(items)
    for name in ("rotary", "long_rotary"):
        values[name] = read_part(name, Rotary, values.get(name))
    values["latent"] = read_part("latent", LatentAttention, values.get("latent"))
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
CPM2_MOE_198B = replace(
    CPM2_11B,
    vocab_size=51968,
    num_experts=32,
    tokenizer="cpm2_zh_en",
    eos_token_ids=(8,),
)
PRESETS = {"cpm2-11b": CPM2_11B, "cpm2-moe-198b": CPM2_MOE_198B}

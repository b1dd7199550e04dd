"""What config.json of a Hugging Face T5 directory means in our terms."""

from collections.abc import Mapping

from engine.config import Activation, ModelConfig
from engine.errors import ConfigError

SUPPORTED = ("t5", "mt5")
# feed_forward_proj -> activation, gated; transformers takes "gated-gelu" for the tanh form
PROJECTIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gated-relu": ("relu", True),
    "gated-gelu": ("gelu_tanh", True),
    "gelu_new": ("gelu_tanh", False),
    "gated-gelu_new": ("gelu_tanh", True),
}


def map_config(values: Mapping[str, object]) -> ModelConfig:
    """Translate config.json; whether the head is tied is left to the files.

    Raises ConfigError if it tells of something that is not supported.
    """
    family = values.get("model_type")
    if family not in SUPPORTED:
        raise ConfigError(
            f"model_type {family!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    if values.get("tokenizer_class") == "ByT5Tokenizer":
        raise ConfigError("ByT5 is not supported: its tokenizer reads bytes, not spiece.model")
    default = "relu" if family == "t5" else "gated-gelu"
    projection = values.get("feed_forward_proj", default)
    if not isinstance(projection, str) or projection not in PROJECTIONS:
        known = ", ".join(PROJECTIONS)
        raise ConfigError(f"feed_forward_proj {projection!r} is not supported; supported: {known}")
    activation, gated = PROJECTIONS[projection]
    num_layers = _integer(values, "num_layers")
    eos = values.get("eos_token_id", 1)
    pad = _integer(values, "pad_token_id", 0)
    return ModelConfig(
        vocab_size=_integer(values, "vocab_size"),
        d_model=_integer(values, "d_model"),
        d_ff=_integer(values, "d_ff"),
        d_kv=_integer(values, "d_kv"),
        num_heads=_integer(values, "num_heads"),
        num_encoder_layers=num_layers,
        num_decoder_layers=_integer(values, "num_decoder_layers", num_layers),
        activation=activation,
        gated=gated,
        scale_logits=_scales_logits(values),
        relative_buckets=_integer(values, "relative_attention_num_buckets", 32),
        relative_max_distance=_integer(values, "relative_attention_max_distance", 128),
        norm_eps=read_epsilon(values),
        max_positions=_integer(values, "n_positions", 512),
        tokenizer="sentencepiece",
        pad_token_id=pad,
        decoder_start_token_id=_integer(values, "decoder_start_token_id", pad),
        eos_token_ids=tuple(
            _integer({"eos_token_id": item}, "eos_token_id")
            for item in (eos if isinstance(eos, list) else [eos])
        ),
        continuation_sentinel=None,
    )


def _scales_logits(values: Mapping[str, object]) -> bool:
    """T5 v1.0 scales by d_model ** -0.5; v1.1 says so by an untied config; mT5 never does.

    transformers 5 stores the answer, as it forgets the untied config when it saves.
    """
    if values["model_type"] != "t5":
        return False
    declared = values.get("scale_decoder_outputs")
    return (
        declared if isinstance(declared, bool) else values.get("tie_word_embeddings") is not False
    )


def _integer(values: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if type(value) is not int:
        raise ConfigError(f"{key} is {value!r}; expected a whole number")
    return value


def read_epsilon(values: Mapping[str, object]) -> float:
    """What is added to the mean square in a norm. Raises ConfigError if it is no number."""
    value = values.get("layer_norm_epsilon", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"layer_norm_epsilon is {value!r}; expected a number")
    return value

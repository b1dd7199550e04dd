"""The families of Hugging Face checkpoints that are read, by the model_type of config.json."""

from engine.checkpoint_hf_config import Values
from engine.checkpoint_hf_deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from engine.checkpoint_hf_gpt2 import GPT2
from engine.checkpoint_hf_gpt_oss import GPT_OSS
from engine.checkpoint_hf_llama import LLAMA, MISTRAL, QWEN2, QWEN3
from engine.checkpoint_hf_moe import MIXTRAL, OLMOE, PHIMOE, QWEN2_MOE, QWEN3_MOE
from engine.checkpoint_hf_nllb import NLLB_MOE
from engine.checkpoint_hf_recipes import Family
from engine.checkpoint_hf_t5 import SWITCH, T5
from engine.errors import ConfigError

FP8 = "fp8"  # of any family: its tensors are dequantised as they are read
FAMILIES: dict[str, Family] = {
    "t5": T5,
    "mt5": T5,
    "switch_transformers": SWITCH,
    "nllb-moe": NLLB_MOE,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "phimoe": PHIMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
}


def find_family(values: Values) -> Family:
    """The family of a config.json. Raises ConfigError, naming those supported, if it is of none.

    Also if its weights are quantised in a way that is not read.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, told = FAMILIES[name], values.get("quantization_config")
    if told is not None:
        method = told.get("quant_method") if isinstance(told, dict) else told
        known = [kind for kind in (FP8, family.quantization) if kind is not None]
        if method not in known:
            raise ConfigError(
                f"quantization_config tells of {method!r} weights, which are not supported; "
                f"supported for {name}: {', '.join(known)}"
            )
    return family

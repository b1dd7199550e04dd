"""How the released CPM-2 files name their tensors, cut them over ranks, and what sizes they tell.

Source: CPM-2 (arXiv:2106.10715) and its released pre-training and fine-tuning code.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.checkpoint_ranks import COLUMNS, ROWS, WHOLE, Cut, Names, merged_shape
from engine.checkpoint_tensors import Shape
from engine.config import ModelConfig, Stack
from engine.errors import CheckpointError

STACKS: tuple[Stack, ...] = ("encoder", "decoder")
WORDS = "word_embeds.weight"
WORD_COPIES = ("encoder.word_embeds.weight", "decoder.word_embeds.weight")
PROMPT = "encoder.prompt_embeds.weight"
BIAS = "blocks.0.self_attn.self_attn.relative_attention_bias.weight"
EXPERT = "ff.expert_network."


SELF_ATTENTION = {
    "self_attention.norm.weight": ("self_attn.layer_norm.weight", WHOLE),
    "self_attention.qkv.weight": ("self_attn.self_attn.project.weight", Cut(0, 3)),
    "self_attention.out.weight": ("self_attn.self_attn.dense.weight", COLUMNS),
}
CROSS_ATTENTION = {
    "cross_attention.norm.weight": ("cross_attn.layer_norm.weight", WHOLE),
    "cross_attention.query.weight": ("cross_attn.cross_attn.project_q.weight", ROWS),
    "cross_attention.key_value.weight": ("cross_attn.cross_attn.project_kv.weight", Cut(0, 2)),
    "cross_attention.out.weight": ("cross_attn.cross_attn.dense.weight", COLUMNS),
}
FEED_FORWARD = {
    "norm": ("layer_norm.weight", WHOLE),
    "wi_0": ("dense_relu_dense.wi_0.weight", ROWS),
    "wi_1": ("dense_relu_dense.wi_1.weight", ROWS),
    "wo": ("dense_relu_dense.wo.weight", COLUMNS),
}
MOE = {
    "moe.centroids": ("ff.expert_centroids", WHOLE),
    "moe.router_norm": (EXPERT + FEED_FORWARD["norm"][0], WHOLE),
}


def dense_names(config: ModelConfig) -> Names:
    """Our name of each tensor that is no expert's -> its key in the rank files and its cut."""
    names: Names = {"embedding.weight": (WORDS, ROWS), "lm_head.weight": ("lm_head.weight", ROWS)}
    for stack in STACKS:
        names[f"{stack}.relative_bias.weight"] = (f"{stack}.{BIAS}", COLUMNS)
        names[f"{stack}.norm.weight"] = (f"{stack}.final_layernorm.weight", WHOLE)
        block = dict(SELF_ATTENTION)
        if stack == "decoder":
            block |= CROSS_ATTENTION
        if config.num_experts:
            block |= MOE
        else:
            block |= {
                f"feed_forward.{name}.weight": (f"ff.{key}", cut)
                for name, (key, cut) in FEED_FORWARD.items()
            }
        for index in range(config.num_layers(stack)):
            for name, (key, cut) in block.items():
                names[f"{stack}.layers.{index}.{name}"] = (f"{stack}.blocks.{index}.{key}", cut)
    return names


def expert_names(layer: str) -> Names:
    """The tensors of one expert of a layer ('encoder-3') -> key in the rank files, and cut."""
    stack, _, index = layer.partition("-")
    prefix = f"{stack}.blocks.{index}.{EXPERT}"
    return {name: (prefix + key, cut) for name, (key, cut) in FEED_FORWARD.items()}


def infer_sizes(path: Path, state: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Sizes of the model, as ModelConfig names them, from the tensors of the first rank file.

    Raises CheckpointError, naming the file, if a tensor that tells a size is missing or odd.
    """

    def shape(key: str, cut: Cut) -> Shape:
        if key not in state or state[key].ndim != 2:
            raise CheckpointError(f"{path}: has no matrix {key}; this is no CPM-2 checkpoint")
        return merged_shape(tuple(state[key].shape), cut, num_ranks)

    is_moe = any(f".{EXPERT}" in key for key in state)
    prefix = f"encoder.blocks.0.{EXPERT if is_moe else 'ff.'}"
    vocab_size, d_model = shape(WORDS, ROWS)
    buckets, num_heads = shape(f"encoder.{BIAS}", COLUMNS)
    inner = shape("encoder.blocks.0.self_attn.self_attn.project.weight", Cut(0, 3))[0] // 3
    if not num_heads or inner % num_heads:
        raise CheckpointError(
            f"{path}: {inner} attention columns do not divide by {num_heads} heads"
        )
    sizes = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": shape(prefix + FEED_FORWARD["wi_0"][0], ROWS)[0],
        "d_kv": inner // num_heads,
        "num_heads": num_heads,
        "relative_buckets": buckets,
    }
    if is_moe:
        sizes["num_experts"] = shape("encoder.blocks.0.ff.expert_centroids", WHOLE)[0]
    for stack in STACKS:
        found = {
            match[1] for key in state if (match := re.match(rf"{stack}\.blocks\.(\d+)\.", key))
        }
        sizes[f"num_{stack}_layers"] = len(found)
    return sizes

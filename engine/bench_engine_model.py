"""Random T5 v1.1 models for `infmoe bench-engine`, as the Hugging Face directory that all read."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoint_hf import open_huggingface
from engine.checkpoint_hf_t5 import HEAD, tensor_names
from engine.checkpoint_writer import dense_shapes
from engine.config import ModelConfig
from engine.model.initial import random_weight

TINY = ModelConfig(
    vocab_size=512,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    tokenizer="sentencepiece",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
    continuation_sentinel=None,
)
MID = ModelConfig(  # T5 v1.1 base: 248 million parameters
    vocab_size=32128,
    d_model=768,
    d_ff=2048,
    d_kv=64,
    num_heads=12,
    num_encoder_layers=12,
    num_decoder_layers=12,
    tokenizer="sentencepiece",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
    continuation_sentinel=None,
)
SIZES = {"tiny": TINY, "mid": MID}


def t5_values(config: ModelConfig) -> dict[str, object]:
    """The `config.json` of a T5 v1.1 of those sizes, in bf16."""
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "dtype": "bfloat16",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_ids[0],
    }


def write_t5(directory: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a T5 of random weights in bf16, the same for the same seed.

    The head's row for padding is nought: ours never makes that token, transformers might.
    """
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names, tensors = tensor_names(config), dict[str, torch.Tensor]()
    for ours, shape in dense_shapes(config).items():
        weight = random_weight(ours, shape, config, generator).bfloat16()
        if ours == HEAD:
            weight[config.pad_token_id] = 0
        parts = weight.chunk(len(names[ours]))
        tensors |= {key: part.contiguous() for key, part in zip(names[ours], parts, strict=True)}
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    (partial / "config.json").write_text(json.dumps(t5_values(config), indent=2))
    partial.rename(directory)


def make_t5(directory: Path, config: ModelConfig) -> Path:
    """The model of those sizes; one that is there already is used.

    Raises ValueError if there is another one.
    """
    if not directory.exists():
        write_t5(directory, config)
    elif open_huggingface(directory).config != config:
        raise ValueError(f"{directory}: is another model than the one to measure; remove it")
    return directory

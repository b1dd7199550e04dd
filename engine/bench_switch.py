"""The opponent of `infmoe bench-offload`: Hugging Face's model, its experts on accelerate's disk.

SwitchTransformers of the same depth, width, heads and experts, every layer sparse, one expert a
token. Its experts have two matrices; so that they are as many bytes as ours, a gated one of three
matrices becomes half as wide again. transformers hands accelerate the safetensors files as they
are: weights on "disk" are opened, mapped and let go of at each use, and nothing is kept but what
the page cache keeps.

Source: accelerate 1.15 `dispatch_model` with an `offload_index`, as transformers 5.23 calls it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.checkpoint_tensors import INDEX
from engine.config import ModelConfig

if TYPE_CHECKING:
    from transformers import SwitchTransformersForConditionalGeneration

PACKAGES = ("accelerate", "transformers")
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
NO_LIMIT = 1 << 16  # tokens per expert: none is dropped


def missing_packages() -> list[str]:
    """The packages that are needed and not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def switch_values(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The `config.json` of the Switch model that is equivalent to one of ours.

    Raises ValueError if the bytes of an expert cannot be made equal.
    """
    width, rest = divmod(config.d_ff * (3 if config.gated else 2), 2)
    if rest:
        raise ValueError(f"d_ff {config.d_ff} is odd: no expert of two matrices is as many bytes")
    return {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": width,
        "d_kv": config.d_kv,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_sparse_encoder_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_sparse_decoder_layers": config.num_decoder_layers,
        "num_experts": config.num_experts,
        "expert_capacity": NO_LIMIT,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def write_switch(directory: Path, config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> None:
    """Write the equivalent model with random weights; memory is needed for the dense part.

    Each expert gets a file of its own, so that reading ahead never runs into the next one.
    """
    values = switch_values(config, dtype)
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for number, shapes in enumerate(_by_file(_empty_model(values).state_dict())):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _weight(key, shape, dtype, generator) for key, shape in shapes.items()}
        save_file(tensors, partial / name, {"format": "pt"})
        _flush(partial / name)
        files |= dict.fromkeys(tensors, name)
    (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (partial / "config.json").write_text(json.dumps(values, indent=2))
    partial.rename(directory)


def is_switch_of(directory: Path, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the directory holds the model that `write_switch` would write."""
    path = directory / "config.json"
    return path.exists() and json.loads(path.read_text()) == switch_values(config, dtype)


def _by_file(state: Mapping[str, Tensor]) -> list[dict[str, torch.Size]]:
    """The tensors of each file: all that is no expert in one, then an expert in each."""
    dense: dict[str, torch.Size] = {}
    experts: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in state.items():
        if ".experts." in key:
            expert = key.rsplit(".", 2)[0]  # ....mlp.experts.expert_3.wi.weight
            experts.setdefault(expert, {})[key] = tensor.shape
        elif key not in TIED:
            dense[key] = tensor.shape
    return [dense, *experts.values()]


def _weight(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random start: rows that keep the size of what they are given, norms of 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    std = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype)


def _flush(path: Path) -> None:
    """Push a file to the disk: only clean pages can be dropped from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _empty_model(values: Mapping[str, object]) -> "SwitchTransformersForConditionalGeneration":
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    with torch.device("meta"):
        return SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig.from_dict(dict(values))
        )


def device_map(module: nn.Module, name: str = "") -> dict[str, str]:
    """Where each part of a model goes: experts to the disk, all else to memory."""
    if name.endswith(".experts"):
        return {name: "disk"}
    if not any(part.endswith("experts") for part, _ in module.named_modules()):
        return {name: "cpu"}
    places: dict[str, str] = {}
    for part, inner in module.named_children():
        places |= device_map(inner, f"{name}.{part}" if name else part)
    return places


class SwitchRunner:
    """The Switch model as transformers runs it."""

    def __init__(self, model: "SwitchTransformersForConditionalGeneration") -> None:
        self.model = model

    def encode(self, source: Tensor) -> Tensor:
        """The encoder sweep."""
        hidden: Tensor = self.model.get_encoder()(
            input_ids=source, attention_mask=torch.ones_like(source)
        ).last_hidden_state
        return hidden

    def decode(self, hidden: Tensor, fed: Tensor) -> list[int]:
        """Decode with the cache."""
        from transformers.modeling_outputs import MoEModelOutput

        ones = torch.ones(hidden.shape[:2], dtype=torch.int64)
        cache, made = None, list[int]()
        for step in range(fed.shape[1]):
            result = self.model(
                encoder_outputs=MoEModelOutput(last_hidden_state=hidden),
                attention_mask=ones,
                decoder_input_ids=fed[:, step : step + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = result.past_key_values
            made += result.logits[:, -1].argmax(-1).tolist()
        return made


@contextmanager
def open_switch(directory: Path) -> Iterator[SwitchRunner]:
    """Load the Switch model with its experts on accelerate's disk and the rest in memory."""
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no types there
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
    values = json.loads((directory / "config.json").read_text())
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        directory,
        dtype=getattr(torch, values["dtype"]),
        device_map=device_map(_empty_model(values)),
        local_files_only=True,
    )
    yield SwitchRunner(model)

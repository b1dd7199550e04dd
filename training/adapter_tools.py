"""Adapters on the disk: what is there, whether it fits, and vectors that come from elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.adapters import (
    OURS,
    PEFT_CONFIG,
    PICKLE,
    TENSORS,
    VECTORS,
    Adapter,
    Slots,
    load_adapter,
    model_fingerprint,
)
from engine.adapters_manifest import FILES, MANIFEST, FileFacts, check_manifest, measure_files
from engine.checkpoint_any import detect_kind, load_any
from engine.checkpoint_cpm2 import open_cpm2
from engine.checkpoint_prompt import read_prompt_file
from engine.checkpoint_ranks import find_iteration
from engine.checkpoint_tensors import read_json
from engine.config import ModelConfig
from engine.errors import CheckpointError, EngineError
from engine.tokenizer import Tokenizer, open_tokenizer
from training.growth_files import check_free, read_model_config
from training.growth_record import read_fingerprint
from training.tune_files import AdapterFacts, write_adapter

VIRTUAL = ("PROMPT_TUNING", "P_TUNING")


def list_adapters(root: Path) -> Iterator[dict[str, Any]]:
    """What each folder with an adapter holds: ROOT/NAME and ROOT/NAME/VERSION, by name.

    Raises CheckpointError if there is no such directory.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: is no directory of adapters")
    for path in sorted([*root.glob(f"*/{PEFT_CONFIG}"), *root.glob(f"*/*/{PEFT_CONFIG}")]):
        name = path.parent.relative_to(root).as_posix()
        try:
            facts = show_adapter(path.parent)
        except EngineError as error:
            yield {"name": name, "error": str(error)}
            continue
        keys = ("vectors", "width", "version", "task", "score")
        yield {"name": name} | {key: facts[key] for key in keys if key in facts}


def show_adapter(path: Path) -> dict[str, Any]:
    """What the files of an adapter tell, checked against its manifest if there is one.

    Raises CheckpointError if one is missing or damaged.
    """
    facts = _check_files(path)
    peft = read_json(path / PEFT_CONFIG)
    ours = read_json(path / OURS) if (path / OURS).exists() else {}
    told = {"vectors": peft.get("num_virtual_tokens"), "width": peft.get("token_dim")}
    sizes = {name: fact.bytes for name, fact in facts.items()}
    return {"kind": peft.get("peft_type")} | told | ours | {"bytes": sizes}


def check_adapter(path: Path, model: Path, *, is_any_base_allowed: bool = False) -> Adapter:
    """Read an adapter for a model. Raises CheckpointError if it is damaged or of another base."""
    _check_files(path)
    fingerprint = None if is_any_base_allowed else _fingerprint(model)
    return load_adapter(path, read_model_config(model), torch.float32, fingerprint=fingerprint)


def import_adapter(
    source: Path,
    model: Path,
    out: Path,
    slots: Slots | None = None,
    *,
    version: str | None = None,
    is_any_base_allowed: bool = False,
) -> Adapter:
    """Write an adapter of vectors from PEFT, a bare tensor or a CPM-2 checkpoint.

    Without `slots` they are those of the source, or all in front. The base is taken to be `model`;
    a source that names another one is refused, unless any is allowed.
    Raises CheckpointError if the source is damaged, is none of these or does not fit.
    """
    check_free(out)
    config, fingerprint = read_model_config(model), _fingerprint(model)
    ours: dict[str, Any] = {}
    if source.is_dir() and (source / PEFT_CONFIG).exists():
        prompt_PD = _read_peft(source)
        ours = read_json(source / OURS) if (source / OURS).exists() else {}
    elif source.is_dir():
        prompt_PD = _read_cpm2(source)
    else:
        prompt_PD = read_prompt_file(source)
    _check_shape(source, prompt_PD, config)
    base = ours.get("base_fingerprint", fingerprint)
    if base != fingerprint and not is_any_base_allowed:
        raise CheckpointError(
            f"{source}: was trained on {str(base)[:12]}, {model} is {fingerprint[:12]}; name its "
            "own model, or say --any-base"
        )
    known = ours.get("slots")
    slots = slots or (Slots(**known) if isinstance(known, dict) else Slots(front=len(prompt_PD)))
    facts = AdapterFacts(
        slots=slots,
        version=version or ours.get("version"),
        base_fingerprint=fingerprint,
        base_name=model.name,
        defaults=ours.get("defaults", {}),
        about={k: v for k, v in ours.items() if k in ("task", "template", "labels", "score")},
    )
    if slots.num_vectors != len(prompt_PD):
        raise CheckpointError(
            f"{source}: has {len(prompt_PD)} vectors; the slots are for {slots.num_vectors}"
        )
    write_adapter(out, prompt_PD, config, facts)
    return load_adapter(out, config, torch.float32, fingerprint=fingerprint)


def note_score(path: Path, model: Path, score: dict[str, Any]) -> None:
    """Write how well an adapter does into its folder; all else in it stays as it is.

    Raises CheckpointError if it is damaged.
    """
    _check_files(path)
    config = read_model_config(model)
    found = load_adapter(path, config, torch.float32)
    ours: dict[str, Any] = read_json(path / OURS) if (path / OURS).exists() else {}
    peft: dict[str, Any] = read_json(path / PEFT_CONFIG)
    beside = [file for file in path.iterdir() if file.name not in (*FILES, MANIFEST)]
    kept = {file.name: file.read_bytes() for file in beside if file.is_file()}
    facts = AdapterFacts(
        slots=found.slots,
        version=ours.get("version"),
        base_fingerprint=found.base_fingerprint,
        base_name=peft.get("base_model_name_or_path"),
        defaults=found.defaults,
        about={**found.about, "score": score},
    )
    write_adapter(path, found.prompt_PD, config, facts)
    for name, content in kept.items():
        (path / name).write_bytes(content)


def find_mark(model: Path, text: str) -> int:
    """The id of the token that a text ends in. Raises CheckpointError if it has none."""
    ids = _open_tokenizer(model).encode(text)
    if not ids:
        raise CheckpointError(f"{model}: its tokenizer has no token for {text!r}")
    return ids[-1]


def export_adapter(path: Path, out: Path) -> int:
    """Write the vectors alone, in fp32 and in their order; returns how many.

    Raises CheckpointError if the file is there, or the adapter damaged.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise CheckpointError(f"{out}: give a new file that ends in .safetensors")
    _check_files(path)
    prompt_PD = _read_peft(path)
    save_file({VECTORS: prompt_PD.float().contiguous()}, out, metadata={"format": "pt"})
    return len(prompt_PD)


def _check_files(path: Path) -> dict[str, FileFacts]:
    if not (path / PEFT_CONFIG).exists():
        raise CheckpointError(f"{path}: holds no adapter; expected {PEFT_CONFIG} in it")
    facts = measure_files(path)
    if (path / MANIFEST).exists():
        check_manifest(path, facts)
    return facts


def _read_peft(path: Path) -> Tensor:
    """Vectors of a prompt-tuning or p-tuning folder; of two sub-modules those of the encoder."""
    values = read_json(path / PEFT_CONFIG)
    kind, count = values.get("peft_type"), values.get("num_virtual_tokens")
    if kind not in VIRTUAL:
        raise CheckpointError(
            f"{path / PEFT_CONFIG}: peft_type is {kind!r}; allowed: {', '.join(VIRTUAL)}"
        )
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{path / PEFT_CONFIG}: num_virtual_tokens is {count!r}")
    file = path / TENSORS
    prompt_PD = read_prompt_file(file if file.exists() else path / PICKLE)
    if len(prompt_PD) % count:
        raise CheckpointError(f"{path}: has {len(prompt_PD)} rows for {count} vectors")
    return prompt_PD[:count].clone()


def _read_cpm2(path: Path) -> Tensor:
    if find_iteration(path) is None:
        raise CheckpointError(f"{path}: is neither a PEFT folder nor a CPM-2 checkpoint")
    prompt_PD = open_cpm2(path).prompt()
    if prompt_PD is None:
        raise CheckpointError(f"{path}: this checkpoint holds no soft prompt")
    return prompt_PD.clone()


def _open_tokenizer(model: Path) -> Tokenizer:
    return open_tokenizer(model, read_model_config(model).tokenizer)


def _fingerprint(model: Path) -> str:
    if detect_kind(model) == "native":
        return read_fingerprint(model)
    return model_fingerprint(load_any(model))


def _check_shape(path: Path, prompt_PD: Tensor, config: ModelConfig) -> None:
    shape = list(prompt_PD.shape)
    if len(shape) != 2 or shape[1] != config.d_model or not shape[0]:
        raise CheckpointError(f"{path}: has shape {shape}; expected vectors x {config.d_model}")
    if not prompt_PD.is_floating_point() or not bool(prompt_PD.isfinite().all()):
        raise CheckpointError(f"{path}: has values that are no finite numbers")

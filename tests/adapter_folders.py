"""Folders of adapters for the tests: as PEFT writes them, as an upload brings them."""

import io
import json
import tarfile
from pathlib import Path

import torch
from safetensors.torch import save

from tests.tiny import DENSE


def vectors(count, seed=0, width=DENSE.d_model):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


def adapter_files(count=3, seed=0, ours=None, tensor=None, **changes):
    """The files of an adapter by name. Other seeds, other vectors."""
    tensor = vectors(count, seed) if tensor is None else tensor
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": count,
        "num_transformer_submodules": 1,
        "token_dim": DENSE.d_model,
    } | changes
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({"prompt_embeddings": tensor.contiguous()}),
    }
    if ours is not None:
        files["infmoe_adapter.json"] = json.dumps(ours).encode()
    return files


def write_files(path: Path, files):
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def make_tar(files, mode="w", **options):
    """A tar of files by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = 1.5  # makes Python write a header of PAX
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()

"""GGUF files, read in Hugging Face's terms, one tensor or one expert at a time; dequantised."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint_gguf_config import hf_config
from engine.checkpoint_gguf_header import GgufHeader, Place, load_gguf_package
from engine.checkpoint_gguf_names import VECTORS, Origin, hf_names
from engine.checkpoint_gguf_parts import open_header
from engine.checkpoint_gguf_tokenizer import (
    begin_token_ids,
    tokenizer_config,
    tokenizer_texts,
)
from engine.checkpoint_hf import HuggingFaceSource, make_source
from engine.checkpoint_tensors import Shape, translated
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.tokenizer_json import JsonTokenizer, make_json_tokenizer

FLOATS: dict[str, torch.dtype] = {  # formats that are no quantised ones
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


CHUNK_BYTES = 8 << 20  # dequantised at once


class GgufTensors:
    """The tensors of a GGUF file by the names that Hugging Face gives them.

    Quantised ones are dequantised, in fp32, and are said to be of bf16: so much is left of them.
    They are read from the file, not mapped, since pages that were read count as memory.
    """

    def __init__(self, header: GgufHeader, origins: Mapping[str, Origin]) -> None:
        self._header = header
        self._origins = origins
        self._package = load_gguf_package()

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or its parts."""
        return self._header.files

    def names(self) -> list[str]:
        """Hugging Face's names, sorted."""
        return sorted(self._origins)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that holds a tensor; bf16 for a quantised one."""
        return FLOATS.get(self._format(self._places(name)[0].kind), torch.bfloat16)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that is not read."""
        parts = (torch.empty(place.shape, device="meta") for place in self._places(name))
        return tuple(self._origins[name].make(*parts).shape)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, made of those of the file as its origin tells."""
        return self._origins[name].make(*map(self._read, self._places(name)))

    def row(self, name: str, index: int) -> Tensor:
        """One of a tensor's first dimension, and no more of the file than that."""
        rows = (self._read(_row(place, index)) for place in self._places(name))
        return self._origins[name].make(*rows)

    def _places(self, name: str) -> list[Place]:
        origin = self._origins[name]
        places = [self._header.places[part] for part in origin.parts]
        return places if origin.row is None else [_row(place, origin.row) for place in places]

    def _read(self, place: Place) -> Tensor:
        path, kind = place.path, place.kind
        with translated(path, "read"):
            data = np.fromfile(path, np.uint8, place.num_bytes, offset=place.offset)
        if len(data) < place.num_bytes:
            raise CheckpointError(f"{path}: has become shorter while it was read")
        dtype = FLOATS.get(self._format(kind))
        if dtype is not None:
            return torch.from_numpy(data).view(dtype).reshape(place.shape)
        rows = data.reshape(-1, place.num_bytes * place.shape[-1] // _count(place))
        floats = np.empty((len(rows), place.shape[-1]), np.float32)
        step = max(CHUNK_BYTES // rows.shape[1], 1)  # dequantising takes several times as much
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            floats[start : start + step] = self._package.dequantize(part, self._kind(kind))
        return torch.from_numpy(floats.reshape(place.shape))

    def _kind(self, kind: int) -> object:
        return self._package.GGMLQuantizationType(kind)

    def _format(self, kind: int) -> str:
        return str(self._package.GGMLQuantizationType(kind).name)


class GgufSource:
    """An open GGUF file, which is a Hugging Face checkpoint in other clothes."""

    kind = "gguf"

    def __init__(self, header: GgufHeader, source: HuggingFaceSource, *, quantized: bool) -> None:
        self._header = header
        self._source = source
        self._is_quantized = quantized

    @property
    def texts(self) -> dict[str, str]:
        """Files of the tokenizer, made up. Raises CheckpointError if it is not supported."""
        texts = tokenizer_texts(self._header)
        return {"tokenizer.json": texts.tokenizer, "tokenizer_config.json": texts.config}

    @property
    def config(self) -> ModelConfig:
        """Sizes and variants of the model."""
        return self._source.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding; bf16 if anything is quantised."""
        return torch.bfloat16 if self._is_quantized else self._source.dtype

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """None: what the tokenizer needs is in the file itself; see `texts`."""
        return {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or its parts."""
        return self._source.files

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is not an expert."""
        return self._source.dense()

    def experts(self, layer: str) -> Iterator[dict[str, Tensor]]:
        """The experts of a layer, in order."""
        return self._source.experts(layer)


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file; all names are checked, no tensor is read.

    Raises CheckpointError if it is damaged, or of an architecture or of formats that are not
    supported.
    """
    header = open_header(path)
    formats = _read_formats(header)
    values = hf_config(header, _vectors(header))
    tensors = GgufTensors(header, hf_names(header, values))
    try:
        source = make_source(path, values, lambda _: tensors, lambda _: begin_token_ids(header))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return GgufSource(header, source, quantized=not formats <= FLOATS.keys())


def open_gguf_tokenizer(path: Path) -> JsonTokenizer:
    """The tokenizer of a GGUF file. Raises CheckpointError or TokenizerError."""
    return make_json_tokenizer(str(path), tokenizer_texts(open_header(path)).tokenizer)


def read_gguf_tokenizer_config(path: Path) -> dict[str, object]:
    """What `tokenizer_config.json` would hold. Raises CheckpointError."""
    return tokenizer_config(open_header(path))


def _read_formats(header: GgufHeader) -> set[str]:
    """The formats of the tensors. Raises CheckpointError if one cannot be dequantised."""
    package = load_gguf_package()
    names = {package.GGMLQuantizationType(place.kind) for place in header.places.values()}
    for name in names:
        kind = name.value
        _, block_bytes = package.GGML_QUANT_SIZES[kind]
        try:
            if name.name not in FLOATS:
                package.dequantize(np.zeros((1, block_bytes), np.uint8), name)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{header.path}: numbers in the format {name.name} cannot be read; Q4_0, Q4_1, "
                "Q8_0, Q4_K, Q6_K, F16, BF16 and others can"
            ) from error
    return {name.name for name in names}


def _vectors(header: GgufHeader) -> dict[str, list[float]]:
    """The tensors that belong to the config."""
    names = [name for name in VECTORS if name in header.places]
    tensors = GgufTensors(header, {name: Origin((name,)) for name in names})
    return {name: tensors.tensor(name).double().tolist() for name in names}


def _row(place: Place, index: int) -> Place:
    """Where one of the first dimension lies."""
    num_bytes = place.num_bytes // place.shape[0]
    start = place.offset + index * num_bytes
    return place._replace(shape=place.shape[1:], offset=start, num_bytes=num_bytes)


def _count(place: Place) -> int:
    return int(np.prod(place.shape))

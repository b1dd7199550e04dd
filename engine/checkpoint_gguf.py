"""GGUF files, read in Hugging Face's terms, one tensor or one expert at a time; dequantised."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint_gguf_header import GgufHeader, Place, load_gguf_package, read_header
from engine.checkpoint_gguf_names import FREQUENCIES, Origin, hf_config, hf_names
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
        """The file."""
        return (self._header.path,)

    def names(self) -> list[str]:
        """Hugging Face's names, sorted."""
        return sorted(self._origins)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that holds a tensor; bf16 for a quantised one."""
        return FLOATS.get(self._format(self._place(name).kind), torch.bfloat16)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that is not read."""
        shape = self._place(name).shape
        return (1, *shape) if self._origins[name].is_row else shape

    def tensor(self, name: str) -> Tensor:
        """Read a tensor; pairs of rows that turn together are put where Hugging Face has them."""
        tensor = self._read(self._place(name)).reshape(self.shape(name))
        heads = self._origins[name].interleaved_heads
        if not heads:
            return tensor
        # (heads, half, 2, ...) -> (heads, 2, half, ...): rows 0 1 2 3 of a head become 0 2 1 3
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def row(self, name: str, index: int) -> Tensor:
        """One of a tensor's first dimension."""
        return self.tensor(name)[index]

    def _place(self, name: str) -> Place:
        origin = self._origins[name]
        place = self._header.places[origin.name]
        if origin.row is None:
            return place
        num_bytes = place.num_bytes // place.shape[0]
        start = place.offset + origin.row * num_bytes
        return place._replace(shape=place.shape[1:], offset=start, num_bytes=num_bytes)

    def _read(self, place: Place) -> Tensor:
        path, kind = self._header.path, place.kind
        with translated(path, "read"):
            data = np.fromfile(path, np.uint8, place.num_bytes, offset=place.offset)
        if len(data) < place.num_bytes:
            raise CheckpointError(f"{path}: has become shorter while it was read")
        dtype = FLOATS.get(self._format(kind))
        if dtype is not None:
            return torch.from_numpy(data).view(dtype).reshape(place.shape)
        rows = data.reshape(-1, place.num_bytes * place.shape[-1] // _count(place))
        floats: NDArray[np.float32] = self._package.dequantize(rows, self._kind(kind))
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
        """The file."""
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
    header = _header(path)
    formats = _read_formats(header)
    values = hf_config(header, _frequencies(header))
    tensors = GgufTensors(header, hf_names(header, values))
    try:
        source = make_source(path, values, lambda _: tensors, lambda _: begin_token_ids(header))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return GgufSource(header, source, quantized=not formats <= FLOATS.keys())


def open_gguf_tokenizer(path: Path) -> JsonTokenizer:
    """The tokenizer of a GGUF file. Raises CheckpointError or TokenizerError."""
    return make_json_tokenizer(str(path), tokenizer_texts(_header(path)).tokenizer)


def read_gguf_tokenizer_config(path: Path) -> dict[str, object]:
    """What `tokenizer_config.json` would hold. Raises CheckpointError."""
    return tokenizer_config(_header(path))


def _header(path: Path) -> GgufHeader:
    """The header, which plan, load, tokenizer and template want, once for as long as it is so."""
    with translated(path, "read"):
        stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_header(path: Path, _size: int, _changed: int) -> GgufHeader:
    return read_header(path)


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


def _frequencies(header: GgufHeader) -> list[float] | None:
    if FREQUENCIES not in header.places:
        return None
    tensors = GgufTensors(header, {FREQUENCIES: Origin(FREQUENCIES)})
    divisors: list[float] = tensors.tensor(FREQUENCIES).double().tolist()
    return divisors


def _count(place: Place) -> int:
    return int(np.prod(place.shape))

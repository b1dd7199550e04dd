"""What a model takes in memory beside its experts, in bytes, known before anything is loaded.

Shape letters: B rows, S source length, T target length, N = B * S tokens, D model width, F feed-
forward width, H heads, K head width, I = H * K, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from engine.checkpoint_tensors import Shape
from engine.checkpoint_writer import dense_shapes
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.masks import MASK_QUERIES
from engine.model.packed import PACKED_BLOCK, PACKED_TYPES
from engine.model.quantized import CHUNK_OUTPUTS
from engine.model.rotary import TABLE_STEP
from offload.layout import round_up

PREFIX_TOKENS = 2  # the start id and the sentinel that the decoder answers to
FLOAT_BYTES = 4  # norms, scores and probabilities are computed in fp32
INDEX_BYTES = 8
LENGTH_BYTES = 8  # of lengths_B
SWEEP_TOKENS = 8192  # that are read at once, with padding; a longer prompt alone
NEVER_PACKED = (  # matrices of no product, and routers
    "embedding.weight",
    "relative_bias.weight",
    "centroids",
    "positions.weight",
    "router.weight",
    "shared_gate.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The most that is computed at once: rows, and the lengths of each.

    `adapter_bytes` are for the soft prompts that lie ready beside it.
    """

    rows: int = 1
    source_tokens: int
    target_tokens: int
    adapter_bytes: int = 0

    def __post_init__(self) -> None:
        if self.adapter_bytes < 0:
            raise ConfigError(f"adapter_bytes is {self.adapter_bytes}; it must be at least 0")
        for name in ("rows", "source_tokens", "target_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def largest_workload(config: ModelConfig, rows: int = 1) -> Workload:
    """The longest requests that are accepted at all."""
    limit = config.max_prompt_tokens
    if config.is_decoder_only:  # prompt and answer together
        return Workload(rows=rows, source_tokens=max(limit - 1, 1), target_tokens=1)
    return Workload(rows=rows, source_tokens=limit, target_tokens=limit + PREFIX_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBytes:
    """Weights that are not experts: all, those of one decoder step, those of one encoder sweep."""

    total: int
    step: int
    sweep: int


@lru_cache(maxsize=16)
def dense_bytes(config: ModelConfig, dtype: torch.dtype) -> DenseBytes:
    """Bytes of the dense weights, exactly.

    A step reads the decoder and the output layer; not what projects the encoder output, which the
    sweep reads, once for a text. The embedding counts in neither: only a few rows of it are read.
    """
    shapes = dense_shapes(config)
    projections = {name for name in shapes if "cross_attention.key_value" in name}
    decoder = {name for name in shapes if name.startswith("decoder.")} - projections
    if config.is_decoder_only:  # the prompt is read by the same weights
        projections = decoder
    head = {"embedding.weight" if config.tied_embeddings else "lm_head.weight"}
    encoder = {name for name in shapes if name.startswith("encoder.")}
    return DenseBytes(
        total=_size(shapes, set(shapes), dtype),
        step=_size(shapes, decoder | head, dtype),
        sweep=_size(shapes, encoder | projections, dtype),
    )


class PackingBytes(NamedTuple):
    """What packed weights take: more than plain ones, and what is held while they are packed."""

    filling: int
    largest: int


@lru_cache(maxsize=16)
def packing_bytes(config: ModelConfig, dtype: torch.dtype) -> PackingBytes:
    """Upper estimate of what packing adds; types that are not packed take none.

    Sides are filled up to whole blocks; a matrix is there twice until its plain copy is let go.
    """
    if dtype not in PACKED_TYPES:
        return PackingBytes(0, 0)
    sizes = [
        (math.prod(shape), math.prod(round_up(side, PACKED_BLOCK) for side in shape))
        for name, shape in dense_shapes(config).items()
        if len(shape) == 2 and not name.endswith(NEVER_PACKED)
    ]
    filling = sum(packed - plain for plain, packed in sizes)
    largest = max(packed for _, packed in sizes)
    return PackingBytes(dtype.itemsize * filling, dtype.itemsize * largest)


def _size(shapes: Mapping[str, Shape], names: set[str], dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(math.prod(shapes[name]) for name in names)


def cache_bytes(config: ModelConfig, dtype: torch.dtype, workload: Workload) -> int:
    """Bytes of a DecoderCache, exactly: keys and values of T and of S positions, mask, lengths.

    CPM-2, one row, S = T = 512, bf16: 2 * 24 * 64 * 64 * 1024 * 2 = 384 MiB, and 1,032 bytes.
    """
    per_position = 2 * config.num_decoder_layers * config.kv_heads * config.d_kv * dtype.itemsize
    positions = workload.source_tokens + workload.target_tokens
    mask = workload.source_tokens * dtype.itemsize
    return workload.rows * (per_position * positions + mask + LENGTH_BYTES)


def output_bytes(config: ModelConfig, dtype: torch.dtype, source_tokens: int) -> int:
    """Bytes of what the encoder makes of a text; of a decoder-only model, its keys and values."""
    width = config.d_model
    if config.is_decoder_only:
        width = 2 * config.num_decoder_layers * config.kv_heads * config.d_kv
    return source_tokens * width * dtype.itemsize


def workspace_bytes(
    config: ModelConfig, dtype: torch.dtype, workload: Workload, *, quantized_on_gpu: bool | None
) -> int:
    """An upper estimate of what is computed with: a sweep and a step, which may alternate.

    Encoding: the attention bias, twice, and its buckets, B*H*S*S and S*S; per token two of width D
    in fp32 and 6 D, 4 I and 3 F; the projections of the encoder output, once more before they are
    contiguous. Decoding: per row scores of V, in the dtype and five times as wide as indices; the
    bias over T positions. Both: what a quantised matrix is dequantised to, a chunk on the CPU, the
    whole matrix on a GPU (`quantized_on_gpu`; None: not quantised).
    """
    if config.is_decoder_only:
        own = _decoder_only_bytes(config, dtype, workload)
        return own + _dequantized_bytes(config, dtype, quantized_on_gpu)
    size, rows, source = dtype.itemsize, workload.rows, workload.source_tokens
    heads, inner = config.num_heads, config.num_heads * config.d_kv
    bias = (rows + 1) * heads * source**2 * size + rows * source**2 * (size + 1)
    buckets = source**2 * 4 * INDEX_BYTES
    widths = 6 * config.d_model + 4 * inner + 3 * config.d_ff
    tokens = rows * source * (widths * size + 2 * config.d_model * FLOAT_BYTES)
    crossing = rows * source * 2 * inner * config.num_decoder_layers * size
    encoding = max(bias + buckets + tokens, crossing)
    target = workload.target_tokens * (heads * size * 2 + 4 * INDEX_BYTES)
    decoding = rows * (config.vocab_size * (size + 5 * INDEX_BYTES) + target + widths * size)
    return encoding + decoding + _dequantized_bytes(config, dtype, quantized_on_gpu)


def _decoder_only_bytes(config: ModelConfig, dtype: torch.dtype, workload: Workload) -> int:
    """The same of a decoder-only model, which reads as many prompts at once as a sweep may have.

    Reading: a part of the mask, as index, as bools and as bias, that again for each head that has a
    copy; per token as above, and the context. Decoding: scores of V, the mask. For both: angles.
    """
    size, source = dtype.itemsize, workload.source_tokens
    num_tokens = max(min(workload.rows * source, SWEEP_TOKENS), source)
    inner = config.num_heads * config.d_kv
    context = 2 * config.num_decoder_layers * config.kv_heads * config.d_kv
    most = config.num_experts_per_token
    wide = max(config.d_ff, config.shared_d_ff, most * config.expert_width)
    widths = (6 + 2 * most) * config.d_model + 6 * inner + 3 * wide
    groups = config.num_heads // config.kv_heads
    copies = config.num_heads if config.attention_sinks else groups if groups > 1 else 0
    per_key = INDEX_BYTES + 3 + size * (1 + len({0, *config.windows}) + copies)
    mask = num_tokens * min(source, MASK_QUERIES) * per_key
    angles = 2 * config.d_kv * (size + FLOAT_BYTES) * round_up(source + TABLE_STEP, TABLE_STEP)
    tokens = num_tokens * ((widths + 2 * context) * size + 2 * config.d_model * FLOAT_BYTES)
    keys = (source + workload.target_tokens) * (2 * size + INDEX_BYTES)
    step = config.vocab_size * (size + 5 * INDEX_BYTES) + keys + widths * size
    return mask + tokens + angles + workload.rows * step


def _dequantized_bytes(
    config: ModelConfig, dtype: torch.dtype, quantized_on_gpu: bool | None
) -> int:
    """Numbers before, while and after they are scaled, in fp32 for fp16."""
    if quantized_on_gpu is None:
        return 0
    narrow, wide = sorted((config.d_model, config.expert_width))
    elements = narrow * wide if quantized_on_gpu else CHUNK_OUTPUTS * wide
    return elements * (2 + 2 * FLOAT_BYTES + dtype.itemsize)

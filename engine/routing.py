"""Recording which experts a model asks for, to be replayed under other plans.

Shape letters: N tokens, D model width, E experts.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.model.layers import FeedForwardWeights
from engine.model.moe import ExpertSource
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer
from offload.trace import LayerCall, RoutingTrace, TraceBuilder, save_trace

logger = logging.getLogger(__name__)

# Computed layers: of 24, some 16,000 tokens of decoding. Each takes 26 bytes, 6 for each expert
# that it wants and 2 for each that was guessed: 110 MiB if that always are 32.
MAX_RECORDS = 400_000


def check_trace_path(path: Path) -> None:
    """Raise ConfigError unless a trace can be written there: at the start, not after hours."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{path}: the routing cannot be written there; name a file in a folder that exists and "
            "can be written"
        )


class _Asked(NamedTuple):
    """A layer whose experts were asked for, and what routers said; their answers may be pending."""

    step: int
    layer: str
    wanted: list[int]
    routed_N: Tensor
    guessed_N: Tensor | None


class RecordingExperts(nn.Module):
    """An `ExpertSource` that passes on to another and records what is asked of it.

    Parameters of the other one keep their names, so saving, loading and moving the model go on as
    before. The router of a layer is asked once more, to learn the tokens of each expert, and that
    of the next layer, to learn what a guess would have been; nobody waits for the answers, which
    are looked at one layer later. For one thread only.
    After `max_records` layers the others are dropped, which is logged once.
    """

    def __init__(
        self, source: ExpertSource, layers: Sequence[AnyMoE], max_records: int = MAX_RECORDS
    ) -> None:
        super().__init__()
        if isinstance(source, nn.Module):
            for name, child in source.named_children():
                self.add_module(name, child)
        self._source_foresee = source.foresee  # methods: the source itself would be a submodule
        self._source_stream = source.stream
        self._layers = {layer.name: layer for layer in layers}
        self._following = {
            layer.name: following.name
            for layer, following in pairwise(layers)
            if _stack(layer.name) == _stack(following.name)
        }
        self._num_experts = layers[0].config.num_experts
        self._builder = TraceBuilder([layer.name for layer in layers], self._num_experts)
        self._max_records = max_records
        self._has_warned = False
        self._passes = _Passes([layer.name for layer in layers])
        self._routed: dict[str, Tensor] = {}
        self._guessed: dict[str, Tensor] = {}
        self._asked: _Asked | None = None

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Ask the routers of this layer and the next, and pass on."""
        if not self._is_full():
            self._routed[layer] = self._route(layer, x_ND)
            following = self._following.get(layer)
            if following is not None:
                self._guessed[following] = self._route(following, x_ND)
        self._source_foresee(layer, x_ND)

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Record and pass on. Raises what the source raises."""
        self._settle()
        if layer in self._routed:
            self._asked = _Asked(
                self._passes.step(layer),
                layer,
                list(wanted),
                self._routed.pop(layer),
                self._guessed.pop(layer, None),
            )
        return self._source_stream(layer, wanted)

    def trace(self) -> RoutingTrace:
        """What has been recorded so far."""
        self._settle()
        return self._builder.build()

    def save(self, path: Path) -> None:
        """Write what has been recorded so far. Raises OSError if that fails."""
        save_trace(self.trace(), path)

    def _is_full(self) -> bool:
        """Whether no more is recorded; told once."""
        is_full = len(self._builder) + (self._asked is not None) >= self._max_records
        if is_full and not self._has_warned:
            self._has_warned = True
            logger.warning("recorded the routing of %d layers; no more", self._max_records)
        return is_full

    @torch.no_grad()
    def _route(self, layer: str, x_ND: Tensor) -> Tensor:
        """What a layer's router says: ids, (N,) or as many for each token as it has experts."""
        return self._layers[layer].choose(x_ND)

    def _settle(self) -> None:
        """Record the layer that was asked for last."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        tokens = self._count(asked.routed_N)
        # a GPU may break a tie of two experts the other way the second time: never below 1
        counts = [max(tokens[expert], 1) for expert in asked.wanted]
        guessed = [0] * self._num_experts
        if asked.guessed_N is not None:
            guessed = self._count(asked.guessed_N)
        guess = sorted(
            filter(guessed.__getitem__, range(self._num_experts)), key=lambda e: -guessed[e]
        )
        self._builder.add(LayerCall(asked.step, asked.layer, asked.wanted, counts, guess))

    def _count(self, expert_N: Tensor) -> list[int]:
        counts: list[int] = torch.bincount(expert_N.cpu(), minlength=self._num_experts).tolist()
        return counts


class _Passes:
    """Numbers the passes through each stack: a layer that does not come later begins a new one.

    Passes through both stacks may be interleaved, those through one may not.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._last: dict[str, tuple[int, int]] = {}  # of each stack: step, place of the layer
        self._num_steps = 0

    def step(self, layer: str) -> int:
        """The number of the pass that computes the layer now."""
        stack, place = _stack(layer), self._places[layer]
        step, last = self._last.get(stack, (0, place))
        if place <= last:
            step = self._num_steps
            self._num_steps += 1
        self._last[stack] = step, place
        return step


def _stack(layer: str) -> str:
    return layer.split("-")[0]


def record_routing(model: Transformer, max_records: int = MAX_RECORDS) -> RecordingExperts:
    """Put a recorder in front of the experts of a model, resident or offloaded.

    Raises ConfigError if the model is dense.
    """
    if model.experts is None:
        raise ConfigError("the model is dense: it has no experts whose routing could be recorded")
    recorder = RecordingExperts(model.experts, model.moe_layers(), max_records)
    model.experts = recorder.train(model.training)
    return recorder


@contextmanager
def recorded(model: Transformer, path: Path | None) -> Iterator[None]:
    """Record the routing of what is computed meanwhile, and write it at the end, come what may."""
    if path is None:
        yield
        return
    recorder = record_routing(model)
    try:
        yield
    finally:
        recorder.save(path)

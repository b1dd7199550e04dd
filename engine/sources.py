"""What the encoder reads: the ids of a text with the vectors of a soft prompt among them.

Shape letters: B rows, S source length, P vectors, D model width.
"""

from collections.abc import Generator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from engine.adapters import Adapter, Slots
from engine.model.context import Past
from engine.model.transformer import Transformer

NO_SLOTS = Slots()


class Source(NamedTuple):
    """A text and the soft prompt that it is read with. Equal only if both are."""

    ids: tuple[int, ...]
    adapter: Adapter | None = None

    @property
    def num_positions(self) -> int:
        """Positions that it takes in the encoder, and in the caches of the decoder."""
        return len(self.ids) + (self.adapter.num_vectors if self.adapter else 0)

    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...], Slots]:
        """The text before the middle slot, the text after it, and the slots."""
        slots = self.adapter.slots if self.adapter else NO_SLOTS
        cut = slots.split(self.ids)
        return self.ids[:cut], self.ids[cut:], slots

    def padded_ids(self, pad: int) -> list[int]:
        """Ids of all positions, with `pad` where vectors go.

        Text a b c d, two vectors in front, one after three tokens, one at the back:
        pad pad a b c pad d pad.
        """
        begin, end, slots = self.parts()
        front, middle, back = slots.front, slots.middle, slots.back
        return [*[pad] * front, *begin, *[pad] * middle, *end, *[pad] * back]

    def vector_positions(self) -> list[int]:
        """Where the vectors go, in their order; in the example above 0, 1, 5, 7."""
        begin, end, slots = self.parts()
        middle = slots.front + len(begin)
        back = middle + slots.middle + len(end)
        lanes = ((0, slots.front), (middle, slots.middle), (back, slots.back))
        return list(chain(*(range(start, start + count) for start, count in lanes)))


class Begun(NamedTuple):
    """The part of a text that was read before: its context, and how many of its ids."""

    context_PW: Tensor
    num_ids: int


class EncoderInput(NamedTuple):
    """Arguments of `Transformer.encode`; no embeddings where the ids tell all."""

    tokens_BS: Tensor
    segments_BS: Tensor
    x_BSD: Tensor | None


def gather(model: Transformer, sources: Sequence[Source]) -> EncoderInput:
    """Pad sources to one length; embed them, if there are vectors to be put among the texts."""
    device, pad = model.embedding.weight.device, model.config.pad_token_id
    longest = max(source.num_positions for source in sources)
    rows = [source.padded_ids(pad) for source in sources]
    padded = [[*row, *[pad] * (longest - len(row))] for row in rows]
    tokens_BS = torch.tensor(padded, dtype=torch.int64)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    segments_BS = (torch.arange(longest) < lengths_B1).long().to(device)
    tokens_BS = tokens_BS.to(device)
    places = [
        row * longest + position
        for row, source in enumerate(sources)
        for position in source.vector_positions()
    ]
    if not places:
        return EncoderInput(tokens_BS, segments_BS, None)
    x_BSD = model.embedding(tokens_BS)
    vectors = torch.cat([source.adapter.prompt_PD for source in sources if source.adapter])
    # one copy for all rows: as fast for as many adapters as there are rows as for one
    x_BSD.view(-1, x_BSD.shape[-1]).index_copy_(0, torch.tensor(places, device=device), vectors)
    return EncoderInput(tokens_BS, segments_BS, x_BSD)


def go_on_layers(model: Transformer, source: Source, begun: Begun) -> Generator[None, None, Tensor]:
    """Read what is left of a text, layer by layer. Returns its whole context, (1, S, W)."""
    device = model.embedding.weight.device
    rest_1S = torch.tensor([source.ids[begun.num_ids :]], dtype=torch.int64, device=device)
    kept_1PW = begun.context_PW.unsqueeze(0)
    past = Past(kept_1PW, torch.tensor([kept_1PW.shape[1]], device=device))
    new_1SW = yield from model.go_on_layers(rest_1S, torch.ones_like(rest_1S), past)
    return torch.cat([kept_1PW, new_1SW], 1)


def encode_layers(model: Transformer, sources: Sequence[Source]) -> Generator[None, None, Tensor]:
    """Run the encoder layer by layer, as `Transformer.encode_layers` does."""
    return (yield from model.encode_layers(*gather(model, sources)))

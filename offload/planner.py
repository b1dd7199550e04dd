"""How budgets in bytes are shared out between experts, before any of them is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.slots import Key, Zone

MIN_STREAMING = 2  # one expert computes while the next arrives
DECODE_SHARE = 1 / 8  # of the slots, for decoder experts that come and go; most are pinned
SWEEP_SHARE = 1 / 16  # of the slots, at most two layers of experts: the encoder passes through


class BudgetTooSmall(ValueError):
    """A budget that cannot hold what is needed; the message does the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlan:
    """Slots of equal size in three zones, the experts pinned to theirs, and those in host memory.

    Sizes in bytes. The experts of `host` wait in host memory that is not slots (on a machine with a
    GPU); those neither pinned nor there are read from disk when they are wanted.
    """

    slot_bytes: int
    layers: tuple[str, ...]
    experts_per_layer: int
    num_decode: int
    num_sweep: int
    pinned: tuple[Key, ...]
    host: tuple[Key, ...] = ()

    @property
    def num_experts(self) -> int:
        """Experts of the model."""
        return len(self.layers) * self.experts_per_layer

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return len(self.pinned) + self.num_decode + self.num_sweep

    @property
    def arena_bytes(self) -> int:
        """Memory that the slots take."""
        return self.slot_bytes * self.num_slots

    @property
    def host_bytes(self) -> int:
        """Memory that waiting experts take beside the slots."""
        return self.slot_bytes * len(self.host)

    @property
    def num_disk(self) -> int:
        """Experts that are on disk only."""
        return self.num_experts - len(self.pinned) - len(self.host)

    @property
    def zones(self) -> dict[Zone, int]:
        """Slots per zone."""
        return {"pinned": len(self.pinned), "decode": self.num_decode, "sweep": self.num_sweep}

    def zone(self, layer: str) -> Zone:
        """Where the experts of a layer go that are not pinned.

        The encoder has slots of its own, so that it never evicts what decoding goes on with; only
        in a plan of a few slots both share.
        """
        if layer.startswith("decoder"):
            return "decode" if self.num_decode else "sweep"
        return "sweep" if self.num_sweep else "decode"


def plan_experts(
    slot_bytes: int,
    layers: Sequence[str],
    experts_per_layer: int,
    budget_bytes: int,
    host_bytes: int = 0,
) -> ExpertPlan:
    """Share a budget out: all experts if they fit, else a pinned part and a few streaming slots.

    Decoder layers are pinned first, because each token needs them and the encoder runs once; within
    a stack the pins are spread evenly over the layers. What is not pinned waits in host memory in
    the same order, as far as `host_bytes` reach. With 2 + 2 layers of 4 experts and 10 slots, 2 are
    for the sweep of the encoder, 2 for decoding, and 6 are pinned: experts 0 of both decoder
    layers, then experts 1, then experts 2.

    Raises BudgetTooSmall if not even MIN_STREAMING slots fit.
    """
    num_experts = len(layers) * experts_per_layer
    least = min(MIN_STREAMING, num_experts)
    num_slots = min(budget_bytes // slot_bytes, num_experts)
    if num_slots < least:
        raise BudgetTooSmall(
            f"{budget_bytes:,} bytes hold {budget_bytes // slot_bytes} experts of {slot_bytes:,} "
            f"bytes; at least {least} are needed: give {least * slot_bytes:,} bytes or more"
        )
    order = by_need(layers, experts_per_layer)
    num_decoder = sum(key.layer.startswith("decoder") for key in order)
    decode, sweep = _streaming(num_slots, num_experts, num_decoder, experts_per_layer)
    num_pinned = num_slots - decode - sweep
    num_host = min(host_bytes // slot_bytes, num_experts - num_pinned)
    return ExpertPlan(
        slot_bytes=slot_bytes,
        layers=tuple(layers),
        experts_per_layer=experts_per_layer,
        num_decode=decode,
        num_sweep=sweep,
        pinned=tuple(order[:num_pinned]),
        host=tuple(order[num_pinned : num_pinned + num_host]),
    )


def by_need(layers: Sequence[str], experts_per_layer: int) -> list[Key]:
    """All experts, decoder first; within a stack expert 0 of all layers, then expert 1, ..."""
    stacks = (
        [layer for layer in layers if layer.startswith("decoder")],
        [layer for layer in layers if not layer.startswith("decoder")],
    )
    return [
        Key(layer, expert)
        for stack in stacks
        for expert in range(experts_per_layer)
        for layer in stack
    ]


def _streaming(
    num_slots: int, num_experts: int, num_decoder: int, per_layer: int
) -> tuple[int, int]:
    """Slots for decoding and for the encoder's sweep; a stack that is pinned whole needs none."""
    if num_slots == num_experts:
        return 0, 0
    if num_slots < 2 * MIN_STREAMING:
        return num_slots, 0
    sweep = min(2 * per_layer, max(MIN_STREAMING, round(num_slots * SWEEP_SHARE)))
    if num_decoder == num_experts:
        sweep = 0
    if num_slots - sweep >= num_decoder:
        return 0, sweep
    return max(MIN_STREAMING, round(num_slots * DECODE_SHARE)), sweep

"""How budgets in bytes are shared out between experts, before any of them is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload.slots import Key, Zone

MIN_STREAMING = 2  # one expert computes while the next arrives
MOST_DECODE = 1 / 4  # of the slots at most come and go while decoding; the others are pinned
MOST_SWEEP = 8  # slots through which the encoder passes: more hide no more (simulated)


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
    rows: int = 1,
) -> ExpertPlan:
    """Share a budget out: all experts if they fit, else a pinned part and a few streaming slots.

    Decoder layers are pinned first, because each token needs them and the encoder runs once; within
    a stack the pins are spread evenly over the layers. What is not pinned waits in host memory in
    the same order, as far as `host_bytes` reach. `rows` decode together as a rule. With 2 + 2
    layers of 4 experts and 9 slots, 2 are for the sweep of the encoder, 2 for decoding, and 5 are
    pinned: experts 0 of both decoder layers, then experts 1, then one expert 2.

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
    decode, sweep = _streaming(num_slots, layers, experts_per_layer, rows)
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


def _streaming(num_slots: int, layers: Sequence[str], per_layer: int, rows: int) -> tuple[int, int]:
    """Slots for decoding and for the encoder's sweep; a stack that is pinned whole needs none."""
    num_layers = sum(layer.startswith("decoder") for layer in layers)
    num_decoder = num_layers * per_layer
    if num_slots == len(layers) * per_layer:
        return 0, 0
    if num_slots < 2 * MIN_STREAMING:
        return num_slots, 0
    sweep = 0
    if num_decoder < len(layers) * per_layer:
        sweep = min(MOST_SWEEP, max(MIN_STREAMING, num_slots // 8))
    left = num_slots - sweep
    if left >= num_decoder:
        return 0, sweep
    for wanted_rows in (rows, 1):
        decode = math.ceil(_moving(left, num_layers, per_layer, wanted_rows))
        if decode <= left * MOST_DECODE:
            return max(MIN_STREAMING, decode), sweep
    return MIN_STREAMING, sweep


def _moving(num_slots: int, num_layers: int, per_layer: int, rows: int) -> float:
    """Experts that one decoding step wants and that are not pinned, if all are alike; and a fifth.

    Fewer slots than that keep nothing from one step to the next, and more keep little more: it is
    the pinned share then that counts. With 24 layers of 32 experts, 198 slots and one row: 22.
    """
    wanted = num_layers * per_layer * (1 - (1 - 1 / per_layer) ** rows)
    return 1.2 * wanted * (1 - num_slots / (num_layers * per_layer))

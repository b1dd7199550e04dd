"""How a budget in bytes is shared out between experts, before any of them is read."""

from dataclasses import dataclass

from offload.slots import Key

MIN_STREAMING = 2  # one expert computes while the next arrives
STREAMING_SHARE = 1 / 8  # of the slots; the rest is pinned


class BudgetTooSmall(ValueError):
    """A budget that cannot hold what is needed; the message does the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlan:
    """Slots of equal size, and the experts that stay in theirs for good. Sizes in bytes."""

    slot_bytes: int
    num_slots: int
    num_experts: int
    pinned: tuple[Key, ...]

    @property
    def arena_bytes(self) -> int:
        """Memory that the slots take."""
        return self.slot_bytes * self.num_slots

    @property
    def num_streaming(self) -> int:
        """Slots through which all other experts pass."""
        return self.num_slots - len(self.pinned)


def plan_experts(
    budget_bytes: int, slot_bytes: int, layers: list[str], experts_per_layer: int
) -> ExpertPlan:
    """Share a budget out: all experts if they fit, else a pinned part and a few streaming slots.

    Decoder layers are pinned first, because each token needs them and the encoder runs once; within
    a stack the pins are spread evenly over the layers. With 3 layers of 4 experts and 6 slots, 2
    stream and 4 are pinned: experts 0 of all decoder layers, then experts 1.

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
    num_streaming = max(MIN_STREAMING, round(num_slots * STREAMING_SHARE))
    num_pinned = num_slots if num_slots == num_experts else num_slots - num_streaming
    by_need = sorted(layers, key=lambda layer: not layer.startswith("decoder"))
    decoder = [layer for layer in by_need if layer.startswith("decoder")]
    others = by_need[len(decoder) :]
    order = [
        Key(layer, expert)
        for stack in (decoder, others)
        for expert in range(experts_per_layer)
        for layer in stack
    ]
    return ExpertPlan(
        slot_bytes=slot_bytes,
        num_slots=num_slots,
        num_experts=num_experts,
        pinned=tuple(order[:num_pinned]),
    )

"""What a plan can give at best: bytes that must move, over the bandwidths that move them.

Routing is taken as uniform, which is the worst case. Arithmetic and the launching of kernels are
not counted, so this is a bound: on a CPU, computing takes its active bytes over the bandwidth of
memory, which is right for a few rows, and too fast for many or for a long source text.

Symbols: E experts per layer, B tokens in a step, U distinct experts per layer.
A step takes the sum of all transfers if none overlap, the longest of them if all do.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from engine.footprint import Workload, cache_bytes, dense_bytes
from engine.machine import Bandwidths
from engine.planning import MemoryPlan
from offload.planner import ExpertPlan

TIER_NAMES = {
    "disk": "the disk",
    "link": "the link to the GPU",
    "dram": "the memory bandwidth",
    "hbm": "the memory bandwidth of the GPU",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass through a stack: bytes that each tier moves, and what that takes.

    `hit_share` of the wanted experts are in a slot. Times in seconds: `serial_s` if nothing
    overlaps, `overlapped_s` if everything does; None if a bandwidth is not known (`missing`).
    """

    tokens: int
    wanted_experts: float
    hit_share: float
    tier_bytes: dict[str, float]
    serial_s: float | None
    overlapped_s: float | None
    bound_by: str | None
    missing: tuple[str, ...]

    @property
    def tokens_per_s(self) -> tuple[float, float] | None:
        """Tokens per second without overlap and with it."""
        if self.serial_s is None or self.overlapped_s is None:
            return None
        return self.tokens / self.serial_s, self.tokens / self.overlapped_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A decoder step of `rows` rows, one token each, and the encoder sweep of their texts."""

    rows: int
    step: Pass
    sweep: Pass

    def to_json(self) -> dict[str, object]:
        """The numbers in JSON's types."""
        rates = self.step.tokens_per_s
        return {
            "rows": self.rows,
            "tokens_per_s": None if rates is None else list(rates),
            "step": asdict(self.step),
            "sweep": asdict(self.sweep),
        }


def distinct_experts(num_experts: int, tokens: int, per_token: int = 1) -> float:
    """Expected number of distinct experts that so many tokens want of one layer.

    32 experts: 1 token wants 1, 64 tokens 27.8, 512 tokens all 32.
    """
    return num_experts * (1 - (1 - per_token / num_experts) ** tokens)


def predict(plan: MemoryPlan, bandwidths: Bandwidths, batch: int) -> Prediction:
    """Bounds for decoding `batch` rows at once, and for encoding their texts."""
    config, dtype = plan.storage.config, plan.storage.dtype
    dense = dense_bytes(config, dtype)
    load = plan.workload
    caches = cache_bytes(
        config,
        dtype,
        Workload(rows=batch, source_tokens=load.source_tokens, target_tokens=load.target_tokens),
    )
    reader = "decoder" if config.is_decoder_only else "encoder"
    return Prediction(
        rows=batch,
        step=_pass(plan, bandwidths, "decoder", batch, dense.step + caches),
        sweep=_pass(plan, bandwidths, reader, batch * load.source_tokens, dense.sweep),
    )


def _pass(
    plan: MemoryPlan, bandwidths: Bandwidths, stack: str, tokens: int, dense_bytes: int
) -> Pass:
    """Sum up what moves when `tokens` tokens go through a stack."""
    wanted, hits, from_disk = 0.0, 1.0, 0.0
    if plan.experts is not None and _layers(plan.experts, stack):
        residence = _stack_residence(plan, stack)
        num_experts, per_token = (
            plan.experts.experts_per_layer,
            plan.storage.config.num_experts_per_token,
        )
        wanted_share = distinct_experts(num_experts, tokens, per_token) / num_experts
        wanted = residence["all"] * wanted_share
        hits = hit_share(residence, wanted_share)
        outside = residence["host"] + residence["disk"]
        from_disk = residence["disk"] / outside if outside else 0.0
    slot = plan.storage.slot_bytes
    missed = wanted * (1 - hits) * slot
    moved = {"disk": missed * from_disk}
    if plan.budgets.gpu_bytes is not None:
        moved |= {"link": missed, "hbm": wanted * slot + dense_bytes}
    else:
        moved |= {"dram": wanted * slot + dense_bytes}
    return _timed(tokens, wanted, hits, moved, bandwidths)


def hit_share(residence: Counter[str], wanted_share: float) -> float:
    """Share of wanted experts that are in a slot, for uniform routing.

    Pinned ones always are. Slots that are taken in turns hold those used last: their share of what
    is not pinned, if they are at least as many as one pass wants of it, and nothing if they are
    fewer, because then each is evicted before its layer comes round again. Of 768 experts 233 are
    pinned and 40 slots go round: of 535 one token wants 16.7, so 273 of 768 hit; a pass that wants
    all 535 hits on the 233 only.

    Source: LRU under independent uniform references; a cyclic scan under LRU.
    """
    moving = residence["all"] - residence["pinned"]
    slots = min(residence["slots"], moving)
    held = slots if slots >= wanted_share * moving else 0
    return (residence["pinned"] + held) / residence["all"]


def _stack_residence(plan: MemoryPlan, stack: str) -> Counter[str]:
    """Experts of one stack: all, pinned, host, disk; and the slots that they take in turns."""
    assert plan.experts is not None
    found = Counter({where: counts[stack] for where, counts in plan.residence().items()})
    layers = _layers(plan.experts, stack)
    found["all"] = len(layers) * plan.experts.experts_per_layer
    found["slots"] = _slots(plan.experts, layers[0])
    return found


def _layers(plan: ExpertPlan, stack: str) -> list[str]:
    """The layers of a stack that have experts."""
    return [layer for layer in plan.layers if layer.startswith(stack)]


def _slots(plan: ExpertPlan, layer: str) -> int:
    """Slots that the experts of a layer take in turns."""
    return plan.zones[plan.zone(layer)]


def _timed(
    tokens: int, wanted: float, hits: float, moved: dict[str, float], bandwidths: Bandwidths
) -> Pass:
    known = {tier: found.per_s for tier, found in bandwidths.by_tier().items() if found}
    missing = tuple(tier for tier, size in moved.items() if size and tier not in known)
    times = {tier: size / known[tier] for tier, size in moved.items() if size and tier in known}
    return Pass(
        tokens=tokens,
        wanted_experts=wanted,
        hit_share=hits,
        tier_bytes=moved,
        serial_s=None if missing else sum(times.values()),
        overlapped_s=None if missing else max(times.values()),
        bound_by=None if missing else max(times, key=lambda tier: times[tier]),
        missing=missing,
    )

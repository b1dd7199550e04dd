"""What a plan would do on a machine that is not there: traces through the real pipeline.

The pipeline, its slots and its lookahead are those that serve; the device is simulated, and time is
that of a virtual clock. Computing is taken to be bound by reading weights from memory: right for
decoding; a sweep over very long inputs takes longer than told here.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import groupby

import numpy as np

from offload.bank import HostBank
from offload.pipeline import ExpertPipeline, Guess
from offload.planner import MIN_STREAMING, ExpertPlan, by_need
from offload.simulated_device import SimulatedDevice, VirtualClock
from offload.trace import LayerCall, RoutingTrace

REPORT_EVERY = 512  # computed layers

OnEach = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Speeds in bytes per second, and the bytes beside experts that one pass through a stack reads.

    `memory` is the one that computing reads from: that of the GPU, or without a GPU (`link` None)
    that of the host.
    """

    disk: float
    memory: float
    link: float | None = None
    decode_dense_bytes: int = 0
    sweep_dense_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("disk", "memory", "link"):
            speed = getattr(self, name)
            if speed is not None and not speed > 0:
                raise ValueError(f"{name} is {speed} bytes per second; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Counts of decoding, or of the sweeps.

    Hits were in a slot, or on the link to one, when they were wanted. Bytes are all that moved, in
    vain or not.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0
    hits: int = 0
    misses: int = 0
    disk_bytes: int = 0
    link_bytes: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0

    def __add__(self, other: "Phase") -> "Phase":
        """Both together."""
        names = [field.name for field in fields(self)]
        return Phase(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, earlier: "Phase") -> "Phase":
        """What was counted since."""
        names = [field.name for field in fields(self)]
        return Phase(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @property
    def hit_rate(self) -> float | None:
        """Share of wanted experts that were there; None if none was wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None if there were none."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step on average; None if there were none."""
        return self.seconds / self.steps if self.steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a policy did on a trace."""

    policy: str
    has_lookahead: bool
    plan: ExpertPlan
    machine: Machine
    decode: Phase
    sweep: Phase

    @property
    def total(self) -> Phase:
        """Both phases."""
        return self.decode + self.sweep

    @property
    def roofline_share(self) -> float | None:
        """Time of the busiest of memory, link and disk over the time that decoding took.

        What computing and moving the same bytes in perfect overlap would take; with everything
        resident that is the limit of the memory.
        """
        decode, machine = self.decode, self.machine
        if not decode.seconds:
            return None
        link_s = decode.link_bytes / machine.link if machine.link else 0.0
        return max(decode.compute_s, decode.disk_bytes / machine.disk, link_s) / decode.seconds


class _Run:
    """The real pipeline on a simulated machine, with the pinned experts in place."""

    def __init__(self, plan: ExpertPlan, machine: Machine) -> None:
        self._clock = VirtualClock()
        self._device = SimulatedDevice(self._clock, plan.slot_bytes, machine.disk, machine.link)
        rows = np.broadcast_to(np.zeros(1, np.uint8), (len(plan.host), 1))
        self._pipeline = ExpertPipeline(
            self._device,
            plan,
            lambda *_: None,
            HostBank(rows, plan.host) if plan.host else None,
            clock=self._clock,
        )
        self._pipeline.preload()
        self._expert_s = plan.slot_bytes / machine.memory
        self._dense_s = dense_seconds(plan, machine)
        self._seen: set[int] = set()  # steps
        self._tokens = 0
        self._compute_s = 0.0

    def compute(self, call: LayerCall, following: LayerCall | None) -> None:
        """One layer: what is not experts, the guess of the next layer, then expert by expert."""
        if call.step not in self._seen:
            self._seen.add(call.step)
            self._tokens += sum(call.counts)
        self._advance(self._dense_s[phase_of(call.layer)])
        guess = None
        if following and following.guess and self._pipeline.wants_guess(following.layer):
            guess = Guess(following.layer, following.guess)
        for _ in self._pipeline.stream(call.layer, call.wanted, guess):
            self._advance(self._expert_s)

    def snapshot(self) -> Phase:
        """All counts so far."""
        stats = self._pipeline.stats
        return Phase(
            steps=len(self._seen),
            tokens=self._tokens,
            seconds=self._clock(),
            compute_s=self._compute_s,
            stall_s=self._clock() - self._compute_s,
            hits=stats.hits,
            misses=stats.misses,
            disk_bytes=self._device.disk_bytes,
            link_bytes=self._device.link_bytes,
            prefetched=stats.prefetched,
            prefetch_used=stats.prefetch_used,
            prefetch_wasted=stats.prefetch_wasted,
        )

    def _advance(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self._compute_s += seconds


def phase_of(layer: str) -> str:
    """The phase in which a layer is computed: decode or sweep."""
    return "decode" if layer.startswith("decoder") else "sweep"


def dense_seconds(plan: ExpertPlan, machine: Machine) -> dict[str, float]:
    """Time that a layer of each phase takes without its experts."""
    num_decoder = sum(phase_of(layer) == "decode" for layer in plan.layers)
    num_encoder = len(plan.layers) - num_decoder
    return {
        "decode": machine.decode_dense_bytes / max(num_decoder, 1) / machine.memory,
        "sweep": machine.sweep_dense_bytes / max(num_encoder, 1) / machine.memory,
    }


def check_fit(trace: RoutingTrace, plan: ExpertPlan) -> None:
    """Raise ValueError unless trace and plan are of models of the same layers and experts."""
    ours = (trace.layers, trace.experts_per_layer)
    theirs = (plan.layers, plan.experts_per_layer)
    if ours != theirs:
        told = [
            f"{len(layers)} layers ({layers[0]} to {layers[-1]}) of {experts} experts"
            for layers, experts in (ours, theirs)
        ]
        raise ValueError(f"the trace is of {told[0]}, the plan of {told[1]}; they must be the same")


def replay(
    trace: RoutingTrace,
    plan: ExpertPlan,
    machine: Machine,
    *,
    policy: str = "pinned+lru",
    has_lookahead: bool = True,
    warm_up: int = 0,
    on_each: OnEach | None = None,
) -> Report:
    """Run a trace through the pipeline under a plan.

    Steps below `warm_up` are run and not counted. `policy` is the name that the report gives;
    without lookahead the guesses of the trace are not looked at. `on_each` is given the number of
    computed layers done, now and then.
    Raises ValueError if trace and plan do not fit, or the plan uses host memory behind no link.
    """
    check_fit(trace, plan)
    if plan.host and machine.link is None:
        raise ValueError("the plan keeps experts in host memory beside slots, so it needs a link")
    run = _Run(plan, machine)
    following = trace.following().tolist()
    phases: defaultdict[str, Phase] = defaultdict(Phase)

    def phase_at(index: int) -> str:
        is_warm = trace.steps[index] >= warm_up
        return phase_of(trace.layers[trace.layer_ids[index]]) if is_warm else "warm-up"

    for phase, indices in groupby(range(len(trace)), phase_at):
        before = run.snapshot()
        for index in indices:
            has_next = has_lookahead and following[index] >= 0
            run.compute(trace.call(index), trace.call(following[index]) if has_next else None)
            if on_each and index % REPORT_EVERY == 0:
                on_each(index)
        phases[phase] += run.snapshot() - before
    return Report(
        policy=policy,
        has_lookahead=has_lookahead,
        plan=plan,
        machine=machine,
        decode=phases["decode"],
        sweep=phases["sweep"],
    )


def policy_plans(plan: ExpertPlan, num_host: int | None = None) -> dict[str, ExpertPlan]:
    """The same slots shared out in other ways; `num_host` experts fit host memory beside them.

    `pinned+lru` is the plan itself; in `lru` nothing is pinned; in `pinned` all slots are, but the
    fewest that streaming needs.
    """
    num_host = len(plan.host) if num_host is None else num_host
    num_decoder = sum(phase_of(key.layer) == "decode" for key in plan.pinned)
    lru = replace(
        plan,
        num_decode=plan.num_decode + num_decoder,
        num_sweep=plan.num_sweep + len(plan.pinned) - num_decoder,
    )
    decode, sweep = _least_streaming(plan)
    pinned = replace(plan, num_decode=decode, num_sweep=sweep)
    return {
        "pinned+lru": plan,
        "lru": _with_pins(lru, 0, num_host),
        "pinned": _with_pins(pinned, plan.num_slots - decode - sweep, num_host),
    }


def _least_streaming(plan: ExpertPlan) -> tuple[int, int]:
    """The fewest slots for decoding and for the sweep; a decoder that is pinned whole needs none.

    It may be so here and not in the plan, which gives more slots to the sweep.
    """
    decode, sweep = (min(count, MIN_STREAMING) for count in (plan.num_decode, plan.num_sweep))
    num_layers = sum(phase_of(layer) == "decode" for layer in plan.layers)
    is_whole = plan.num_slots - sweep >= num_layers * plan.experts_per_layer
    return (0 if sweep and is_whole else decode), sweep


def _with_pins(plan: ExpertPlan, num_pinned: int, num_host: int) -> ExpertPlan:
    """Pin experts in the planner's order, and keep the next ones in host memory."""
    order = by_need(plan.layers, plan.experts_per_layer)
    host = order[num_pinned : num_pinned + num_host]
    return replace(plan, pinned=tuple(order[:num_pinned]), host=tuple(host))


def compare(
    trace: RoutingTrace,
    plan: ExpertPlan,
    machine: Machine,
    *,
    num_host: int | None = None,
    warm_up: int = 0,
    on_each: Callable[[int, int], None] | None = None,
) -> list[Report]:
    """Replay a trace under each policy, without lookahead and, if it holds guesses, with it.

    `on_each` is given the computed layers done and their number, of all replays.
    Raises ValueError as `replay` does.
    """
    runs = [
        (name, variant, has_lookahead)
        for name, variant in policy_plans(plan, num_host).items()
        for has_lookahead in ([False, True] if len(trace.guesses) else [False])
    ]
    reports = []
    for run, (name, variant, has_lookahead) in enumerate(runs):

        def report_done(done: int, before: int = run * len(trace)) -> None:
            if on_each:
                on_each(before + done, len(runs) * len(trace))

        report = replay(
            trace,
            variant,
            machine,
            policy=name,
            has_lookahead=has_lookahead,
            warm_up=warm_up,
            on_each=report_done,
        )
        reports.append(report)
    return reports

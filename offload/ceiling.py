"""The best that any policy could do with the same slots, knowing the future: Belady's optimum."""

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.planner import ExpertPlan
from offload.simulate import Machine, check_fit, dense_seconds, phase_of
from offload.trace import RoutingTrace

Ints = NDArray[np.int64]


class Optimum(NamedTuple):
    """Experts wanted, and how many of them any policy has to load at least."""

    wanted: int
    loads: int

    @property
    def hit_rate(self) -> float | None:
        """Share that need not be loaded; None if none was wanted."""
        return 1 - self.loads / self.wanted if self.wanted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Bounds for all policies. Each phase is bounded by itself, as if it had all slots.

    A policy that fetches ahead may count more hits, but moves no fewer bytes.
    """

    total: Optimum
    decode: Optimum
    sweep: Optimum
    loaded_bytes: int
    tokens_per_s: float | None
    sweep_s: float | None


def ceiling(
    trace: RoutingTrace, plan: ExpertPlan, machine: Machine, *, warm_up: int = 0
) -> Ceiling:
    """Bound what any policy can do with the slots of a plan, whatever lies in them at the start.

    Time is that of computing or of loading, whichever is longer: perfect overlap.
    Raises ValueError if trace and plan do not fit.
    """
    check_fit(trace, plan)
    phases = np.array([phase_of(layer) for layer in trace.layers])[trace.layer_ids]
    is_warm = trace.steps >= warm_up
    is_decode, is_sweep = is_warm & (phases == "decode"), is_warm & (phases == "sweep")
    total, decode, sweep = (
        optimum(trace, which, plan.num_slots) for which in (is_warm, is_decode, is_sweep)
    )
    seconds = [
        _least_s(trace, plan, machine, which, least)
        for which, least in ((is_decode, decode), (is_sweep, sweep))
    ]
    tokens = _num_tokens(trace, is_decode)
    num_sweeps = len(np.unique(trace.steps[is_sweep]))
    return Ceiling(
        total=total,
        decode=decode,
        sweep=sweep,
        loaded_bytes=total.loads * plan.slot_bytes,
        tokens_per_s=tokens / seconds[0] if tokens else None,
        sweep_s=seconds[1] / num_sweeps if num_sweeps else None,
    )


def optimum(trace: RoutingTrace, which: NDArray[np.bool_], num_slots: int) -> Optimum:
    """The fewest loads that serve the chosen calls of a trace.

    An expert wanted by two calls is a hit the second time if a slot kept it in between; of all such
    spans, at most `num_slots` may overlap. Dropping the one that ends last wherever there are too
    many keeps the most of them. What lies in the slots at the start is free. Inside of a layer the
    order is free, too: a load there need not push out what the same layer wants.
    Source: Belady (1966), as scheduling of intervals (Faigle and Nawijn, 1995).
    """
    times, keys = _accesses(trace, which)
    first_keys, first = np.unique(keys, return_index=True)
    order = np.argsort(times[first], kind="stable")[:num_slots]
    kept = dict(zip(first_keys[order].tolist(), times[first][order].tolist(), strict=True))
    ends = [(-end, key) for key, end in kept.items()]
    ends.sort()  # a heap: the latest end first
    loads = 0
    previous = -1
    for time, key, again in zip(
        times.tolist(), keys.tolist(), _next_uses(times, keys).tolist(), strict=True
    ):
        if time != previous:
            _drop_latest(kept, ends, num_slots)
            previous = time
        loads += kept.pop(key, None) != time
        if again >= 0:
            kept[key] = again
            heappush(ends, (-again, key))
    return Optimum(len(keys), loads)


def _drop_latest(kept: dict[int, int], ends: list[tuple[int, int]], num_slots: int) -> None:
    """Keep as many experts as there are slots: those wanted soonest."""
    while len(kept) > num_slots:
        end, key = heappop(ends)
        if kept.get(key) == -end:
            del kept[key]


def _accesses(trace: RoutingTrace, which: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Index of the call and number of the expert, for each expert wanted by the chosen calls."""
    lengths = np.diff(trace.wanted_ends, prepend=0)
    times = np.repeat(np.arange(len(trace)), lengths)
    keys = trace.layer_ids[times].astype(np.int64) * trace.experts_per_layer + trace.experts
    chosen = which[times]
    return times[chosen], keys[chosen]


def _next_uses(times: Ints, keys: Ints) -> Ints:
    """For each access the time of the next one of the same expert, or -1."""
    order = np.argsort(keys, kind="stable")
    is_same = np.diff(keys[order]) == 0
    following = np.full(len(keys), -1)
    following[order[:-1][is_same]] = times[order[1:][is_same]]
    return following


def _least_s(
    trace: RoutingTrace,
    plan: ExpertPlan,
    machine: Machine,
    which: NDArray[np.bool_],
    least: Optimum,
) -> float:
    """Seconds that the chosen calls take at least: computing or loading."""
    dense_s = dense_seconds(plan, machine)
    layer_s = np.array([dense_s[phase_of(layer)] for layer in trace.layers])
    compute_s = float(layer_s[trace.layer_ids[which]].sum())
    compute_s += least.wanted * plan.slot_bytes / machine.memory
    return max(compute_s, least.loads * plan.slot_bytes / (machine.link or machine.disk))


def _num_tokens(trace: RoutingTrace, which: NDArray[np.bool_]) -> int:
    """Tokens of the chosen steps, each counted at its first layer."""
    _, first = np.unique(trace.steps[which], return_index=True)
    begins = np.concatenate([[0], trace.wanted_ends[:-1]])
    tokens = np.add.reduceat(trace.counts, begins, dtype=np.int64) if len(trace) else begins
    return int(tokens[which][first].sum())

from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import inf

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.ceiling import ceiling, optimum
from offload.device import HostDevice, open_host_device
from offload.pipeline import ExpertPipeline, Guess
from offload.planner import ExpertPlan, plan_experts
from offload.simulate import Machine, policy_plans, replay
from offload.simulated_device import SimulatedDevice, VirtualClock
from offload.slots import Key
from offload.trace import LayerCall, TraceBuilder
from offload.trace_kinds import KINDS, Texts, generate_trace

MIB = 2**20
LAYERS = ("encoder-0", "encoder-1", "decoder-0", "decoder-1")
TEXTS = Texts(layers=LAYERS, experts_per_layer=6, texts=3, source_tokens=10, steps=30, batch=2)
# An expert is 2 chunks: 1 s from disk, 0.5 s over the link, 0.25 s to compute; a layer takes 0.5 s
SLOT_BYTES = 16 * MIB
SLOW = Machine(
    disk=16 * MIB,
    memory=64 * MIB,
    decode_dense_bytes=64 * MIB,
    sweep_dense_bytes=64 * MIB,
)
LINKED = replace(SLOW, link=32 * MIB)


def build(*calls, layers=LAYERS, experts=6):
    """A trace of (step, layer, wanted, guess) with one token for each expert."""
    builder = TraceBuilder(layers, experts)
    for step, layer, wanted, guess in calls:
        builder.add(LayerCall(step, layer, wanted, [1] * len(wanted), guess))
    return builder.build()


def small_plan(pinned=(), host=(), decode=2, sweep=2):
    return ExpertPlan(
        slot_bytes=SLOT_BYTES,
        layers=LAYERS,
        experts_per_layer=6,
        num_decode=decode,
        num_sweep=sweep,
        pinned=tuple(Key(*key) for key in pinned),
        host=tuple(Key(*key) for key in host),
    )


# the device


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def host(clock):
    return SimulatedDevice(clock, SLOT_BYTES, SLOW.disk)


@pytest.fixture
def gpu(clock):
    return SimulatedDevice(clock, SLOT_BYTES, LINKED.disk, LINKED.link)


def fill(*_):
    raise AssertionError("there are no bytes to fill a slot with")


def test_reads_are_served_one_after_another(clock, host):
    first, second = host.read(0, fill), host.read(1, fill)
    assert not first.is_ready()
    clock.advance(0.75)
    third = host.read(2, fill)
    first.wait()
    assert clock() == 1.0
    clock.advance(0.5)  # computing goes on meanwhile
    second.wait()
    assert clock() == 2.0
    clock.advance(5.0)
    assert third.is_ready()
    third.wait()
    assert clock() == 7.0
    host.read(3, fill).wait()
    assert clock() == 8.0
    assert (host.disk_bytes, host.link_bytes) == (4 * SLOT_BYTES, 0)
    assert host.view(0) is host.view(3)


def test_a_read_that_is_given_up_ends_with_its_chunk(clock, host):
    first, second, third = (host.read(slot, fill) for slot in range(3))
    clock.advance(0.1)
    for transfer in (first, first, second):
        transfer.stop()
    assert not first.is_ready()
    assert second.is_ready()  # it never began
    assert second.has_failed()
    first.join()
    assert clock() == 0.5
    assert first.has_failed()
    third.wait()
    assert clock() == 1.5
    assert not third.has_failed()
    assert host.disk_bytes == SLOT_BYTES + 8 * MIB


def test_a_read_in_its_last_chunk_lands_all_the_same(clock, host):
    transfer = host.read(0, fill)
    clock.advance(0.6)
    transfer.stop()
    transfer.join()
    assert clock() == 1.0
    assert not transfer.has_failed()
    transfer.stop()  # too late, and no harm


def test_reads_pass_the_disk_and_then_the_link_and_copies_the_link_only(clock, gpu):
    reads = [gpu.read(slot, fill) for slot in range(2)]
    clock.advance(0.75)
    copies = [gpu.copy(slot, np.zeros(1, np.uint8)) for slot in (2, 3)]
    # link: copy 0.75 to 1.25, read 0 (there at 1.0) to 1.75 after copy 1 to 1.75: order of arrival
    assert all(copy.is_ready() for copy in copies)  # the host has nothing more to do with them
    assert not reads[0].is_ready()
    for transfer, time in zip([*copies, *reads], [1.25, 1.75, 2.25, 2.75], strict=True):
        transfer.wait()
        assert clock() == time
    assert (gpu.disk_bytes, gpu.link_bytes) == (2 * SLOT_BYTES, 4 * SLOT_BYTES)


def test_what_is_on_the_link_takes_its_course(clock, gpu):
    copy, read = gpu.copy(0, np.zeros(1, np.uint8)), gpu.read(1, fill)
    copy.stop()
    copy.join()
    assert clock() == 0.0
    read.join()  # until it is on the link
    assert clock() == 1.0
    read.stop()
    read.wait()
    assert clock() == 1.5
    assert not read.has_failed()


def test_a_read_that_is_given_up_in_time_never_reaches_the_link(clock, gpu):
    cut, late = gpu.read(0, fill), gpu.read(1, fill)
    clock.advance(0.25)
    cut.stop()
    clock.advance(0.25)
    assert cut.has_failed()
    clock.advance(0.75)
    late.stop()  # in its last chunk: read as a whole, and not copied
    late.join()
    assert clock() == 1.5
    assert late.has_failed()
    assert (gpu.disk_bytes, gpu.link_bytes) == (24 * MIB, 0)


# the replay


def test_a_schedule_by_hand_without_a_gpu():
    plan = small_plan([("decoder-0", 0), ("decoder-1", 0)])
    trace = build((0, "decoder-0", [0, 1, 2], []), (0, "decoder-1", [0], []))
    report = replay(trace, plan, SLOW)
    # layer 0.5; reads begin. 0 to 0.75; 1 lands at 1.5, to 1.75; 2 lands at 2.5, to 2.75.
    # layer to 3.25; 0 to 3.5. Of it 2 layers and 4 experts compute: 2.0.
    decode = report.decode
    assert (decode.seconds, decode.compute_s, decode.stall_s) == (3.5, 2.0, 1.5)
    assert (decode.steps, decode.tokens, decode.tokens_per_s) == (1, 3, 3 / 3.5)
    assert (decode.hits, decode.misses, decode.hit_rate) == (2, 2, 0.5)
    assert (decode.disk_bytes, decode.link_bytes) == (2 * SLOT_BYTES, 0)
    assert report.roofline_share == 2.0 / 3.5
    assert report.sweep.hit_rate is None
    assert report.sweep.step_s is None


def test_a_schedule_by_hand_with_three_tiers():
    plan = small_plan([("decoder-0", 0)], [("decoder-0", 1), ("decoder-0", 2)], decode=3)
    trace = build((0, "decoder-0", [3, 1, 2, 0], []))
    report = replay(trace, plan, LINKED)
    # One layer of this stack of two: 0.5. Disk: 3 to 1.5. Link: 1 to 1.0, 2 to 1.5, 3 to 2.0.
    # 0 to 0.75; the host has done its part for 1 and 2: 1 lands at 1.0, to 1.25; 2 at 1.5, to 1.75;
    # 3 lands at 2.0, to 2.25.
    assert report.decode.seconds == 2.25
    assert report.decode.stall_s == 0.75
    assert (report.decode.disk_bytes, report.decode.link_bytes) == (SLOT_BYTES, 3 * SLOT_BYTES)


# Guesses that are right, 8 times: enough to be believed from then on. Of three experts that take
# turns in two slots the wanted one is never there; a guess of what is there would not count.
# Afterwards 3 and 4 of decoder-1 are there, 4 used last.
RIGHT = [
    call
    for step in range(8)
    for expert in (3 + step % 3,)
    for call in ((step, "decoder-0", [0], []), (step, "decoder-1", [expert], [expert]))
]


def test_a_right_guess_by_hand():
    plan = small_plan([("decoder-0", 0), ("decoder-1", 0)])
    trace = build(*RIGHT, (8, "decoder-0", [0], []), (8, "decoder-1", [1], [1]))
    report = replay(trace, plan, SLOW, warm_up=8)
    # layer 0.5; the read begins; 0 to 0.75; layer to 1.25; the read lands at 1.5; 1 to 1.75.
    assert report.decode.seconds == 1.75
    assert (report.decode.prefetched, report.decode.prefetch_used) == (1, 1)
    without = replay(trace, plan, SLOW, warm_up=8, has_lookahead=False)
    assert without.decode.seconds == 2.5
    assert without.decode.prefetched == 0


def test_a_wrong_guess_by_hand_costs_a_chunk():
    plan = small_plan([("decoder-0", 0), ("decoder-1", 0)])
    trace = build(*RIGHT, (8, "decoder-0", [0], []), (8, "decoder-1", [1], [2]))
    report = replay(trace, plan, SLOW, warm_up=8)
    # The read of 2 began at 0.5 and is given up at 1.25, in its chunk to 1.5; 1 lands at 2.5.
    assert report.decode.seconds == 2.75
    assert report.decode.disk_bytes == 2 * SLOT_BYTES
    assert (report.decode.prefetched, report.decode.prefetch_wasted) == (1, 1)


def test_steps_may_be_interleaved():
    trace = build(
        (0, "encoder-0", [0, 1], []),
        (1, "decoder-0", [2], []),
        (1, "decoder-1", [3], []),
        (0, "encoder-1", [1], [2]),
    )
    report = replay(trace, small_plan(), SLOW)
    assert (report.decode.steps, report.decode.tokens, report.decode.seconds) == (1, 1, 3.5)
    assert (report.sweep.steps, report.sweep.tokens, report.sweep.seconds) == (1, 2, 4.5)
    assert report.total.misses == 5


def counts_of_the_real(trace, plan, device, has_lookahead):
    """What the pipeline counts over a real device."""

    def read(key, out, _):
        out[:] = key.expert

    pipeline = ExpertPipeline(device, plan, read)
    pipeline.preload()
    before = pipeline.stats
    following = trace.following()
    for index, call in enumerate(trace.calls()):
        guess = None
        if has_lookahead and following[index] >= 0:
            after = trace.call(following[index])
            if after.guess and pipeline.wants_guess(after.layer):
                guess = Guess(after.layer, after.guess)
        for expert, blob in pipeline.stream(call.layer, call.wanted, guess):
            assert (blob == expert).all()
    stats = pipeline.stats - before
    pipeline.close()
    return (
        (stats.hits, stats.misses, stats.prefetched, stats.prefetch_used, stats.prefetch_wasted),
        pipeline.resident(),
    )


class NowArrival:
    def is_ready(self):
        return True

    def wait(self):
        pass

    def stop(self):
        pass

    def has_failed(self):
        return False


class NowDevice:
    """Fills slots at once."""

    trust = HostDevice.trust

    def __init__(self, num_slots, slot_bytes):
        self.slots = np.zeros((num_slots, slot_bytes), np.uint8)

    def read(self, slot, fill):
        fill(self.slots[slot], lambda: False)
        return NowArrival()

    def view(self, slot):
        return self.slots[slot]

    def release(self, slot):
        pass

    def close(self):
        pass


@st.composite
def cases(draw, max_batch=4, precision=None):
    """A trace, a plan for its model and a machine to replay it on."""
    stacks = draw(st.sampled_from([("decoder",), ("encoder", "decoder")]))
    num_layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    layers = tuple(f"{stack}-{i}" for stack in stacks for i in range(num_layers))
    texts = Texts(
        layers=layers,
        experts_per_layer=experts,
        texts=draw(st.integers(1, 3)),
        source_tokens=draw(st.integers(1, 12)),
        steps=draw(st.integers(1, 40)),
        batch=draw(st.integers(1, max_batch)),
        precision=draw(st.floats(0, 1)) if precision is None else precision,
        seed=draw(st.integers(0, 99)),
    )
    trace = generate_trace(draw(st.sampled_from(KINDS)), texts)
    num_slots = draw(st.integers(2, len(layers) * experts))
    has_host = draw(st.booleans())
    num_host = draw(st.integers(0, len(layers) * experts)) if has_host else 0
    plan = plan_experts(SLOT_BYTES, layers, experts, num_slots * SLOT_BYTES, num_host * SLOT_BYTES)
    machine = Machine(
        disk=draw(st.sampled_from([1e8, 1e9, 1e10])),
        memory=draw(st.sampled_from([1e9, 1e10])),
        link=draw(st.sampled_from([1e9, 2e10])) if has_host else None,
        decode_dense_bytes=draw(st.sampled_from([0, 32 * MIB, 512 * MIB])),
        sweep_dense_bytes=draw(st.sampled_from([0, 64 * MIB])),
    )
    return trace, plan, machine


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_without_lookahead_the_counts_are_those_over_real_memory(case):
    trace, plan, machine = case
    plan = replace(plan, slot_bytes=4096, host=())
    device = open_host_device(4096, plan.num_slots, num_readers=1)
    expected, _ = counts_of_the_real(trace, plan, device, has_lookahead=False)
    total = replay(trace, plan, replace(machine, link=None), has_lookahead=False).total
    assert (total.hits, total.misses, 0, 0, 0) == expected
    assert total.disk_bytes == total.misses * 4096


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_with_lookahead_the_counts_are_those_over_a_device_as_fast(case):
    trace, plan, machine = case
    plan = replace(plan, slot_bytes=64, host=())
    device = NowDevice(plan.num_slots, 64)
    expected, _ = counts_of_the_real(trace, plan, device, has_lookahead=True)
    report = replay(trace, plan, replace(machine, disk=inf, link=None))
    total = report.total
    counts = (total.prefetched, total.prefetch_used, total.prefetch_wasted)
    assert (total.hits, total.misses, *counts) == expected
    assert total.stall_s == pytest.approx(0, abs=1e-9)


def test_a_scan_hits_its_pinned_share_where_lru_hits_nothing():
    layers = tuple(f"decoder-{i}" for i in range(4))
    trace = generate_trace("uniform", replace(TEXTS, layers=layers, batch=500, precision=0.0))
    plan = plan_experts(SLOT_BYTES, layers, 6, 16 * SLOT_BYTES)
    rates = {
        name: replay(trace, variant, SLOW).decode.hit_rate
        for name, variant in policy_plans(plan).items()
    }
    assert rates["lru"] == 0
    assert rates["pinned"] == pytest.approx(14 / 24)
    assert rates["pinned+lru"] == pytest.approx(len(plan.pinned) / 24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_lookahead", [False, True])
def test_with_everything_resident_the_memory_is_the_limit(kind, has_lookahead):
    texts = replace(TEXTS, batch=1)
    trace = generate_trace(kind, texts)
    plan = plan_experts(SLOT_BYTES, LAYERS, 6, 10**12)
    report = replay(trace, plan, SLOW, has_lookahead=has_lookahead)
    step_bytes = SLOW.decode_dense_bytes + 2 * SLOT_BYTES
    assert report.decode.tokens_per_s == pytest.approx(SLOW.memory / step_bytes, rel=1e-12)
    assert report.roofline_share == pytest.approx(1, rel=1e-12)
    assert (report.total.misses, report.total.disk_bytes) == (0, 0)
    best = ceiling(trace, plan, SLOW)
    assert best.tokens_per_s == pytest.approx(report.decode.tokens_per_s, rel=1e-12)
    assert (best.total.hit_rate, best.loaded_bytes) == (1, 0)


@settings(max_examples=80, deadline=None)
@given(case=cases(precision=1.0, max_batch=1))
def test_right_guesses_of_one_expert_are_never_slower_than_none(case):
    trace, plan, machine = case
    for variant in policy_plans(plan).values():
        ahead = replay(trace, variant, machine).total
        without = replay(trace, variant, machine, has_lookahead=False).total
        assert ahead.seconds <= without.seconds * (1 + 1e-9)


def test_a_guess_does_not_push_out_what_it_names():
    plan = replace(small_plan(decode=3), layers=LAYERS[2:])
    fill_slots = [
        (8, "decoder-0", [1], []),
        (9, "decoder-0", [0], []),  # now decoder-1's expert 4 was used longest ago
        (10, "decoder-0", [0], []),
        (10, "decoder-1", [1, 4], [1, 4]),
    ]
    trace = build(*RIGHT, *fill_slots, layers=LAYERS[2:])
    decode = replay(trace, plan, SLOW, warm_up=10).decode
    assert decode.disk_bytes == SLOT_BYTES
    assert (decode.prefetched, decode.prefetch_used) == (1, 1)


def test_a_guess_of_what_is_there_is_not_judged():
    """Eight right guesses of a pinned expert, and those of others are not believed all the same."""
    plan = small_plan([("decoder-0", 0), ("decoder-1", 0)])
    pairs = [((s, "decoder-0", [0], []), (s, "decoder-1", [0], [0])) for s in range(8)]
    easy = [call for pair in pairs for call in pair]
    last = [(8, "decoder-0", [0], []), (8, "decoder-1", [1], [1])]
    assert replay(build(*easy, *last), plan, SLOW).decode.prefetched == 0
    assert replay(build(*RIGHT, *last), plan, SLOW).decode.prefetched == 1


def test_a_wrong_guess_does_not_hold_up_a_resident():
    others = [("decoder-1", expert) for expert in range(1, 6)]
    plan = small_plan([("decoder-0", 0), ("decoder-1", 0)], others)
    trace = build(*RIGHT, (8, "decoder-0", [0], []), (8, "decoder-1", [0], [1]))
    decode = replay(trace, plan, replace(LINKED, link=2 * MIB), warm_up=8).decode
    assert (decode.stall_s, decode.prefetched) == (0, 1)


def test_over_a_link_guesses_must_be_all_but_certain():
    """Three right guesses in four are enough without a GPU (0.6), and not with one (0.97)."""
    plan = small_plan([("decoder-0", 0)])
    calls = [
        call
        for step in range(40)
        for expert in (3 + step % 3,)
        for guess in (0 if step % 4 == 1 else expert,)
        for call in ((step, "decoder-0", [0], []), (step, "decoder-1", [expert], [guess]))
    ]
    assert replay(build(*calls), plan, SLOW).decode.prefetched > 20
    assert replay(build(*calls), plan, LINKED).decode.prefetched == 0


@settings(max_examples=80, deadline=None)
@given(case=cases(precision=0.0))
def test_wrong_guesses_are_not_followed(case):
    trace, plan, machine = case
    for variant in policy_plans(plan).values():
        ahead = replay(trace, variant, machine)
        without = replay(trace, variant, machine, has_lookahead=False)
        assert ahead.total.prefetched == 0
        assert ahead.total.seconds <= without.total.seconds * 1.03


@settings(max_examples=80, deadline=None)
@given(case=cases(), warm_up=st.integers(0, 10))
def test_no_policy_does_better_than_the_optimum(case, warm_up):
    trace, plan, machine = case
    best = ceiling(trace, plan, machine, warm_up=warm_up)
    for variant in policy_plans(plan).values():
        without = replay(trace, variant, machine, has_lookahead=False, warm_up=warm_up)
        for phase, least in (
            (without.total, best.total),
            (without.decode, best.decode),
            (without.sweep, best.sweep),
        ):
            assert phase.hits + phase.misses == least.wanted
            assert phase.misses >= least.loads
        for report in (without, replay(trace, variant, machine, warm_up=warm_up)):
            total = report.total
            moved = total.link_bytes if machine.link else total.disk_bytes
            if not warm_up:  # else what was fetched ahead before comes for nothing
                assert moved >= best.loaded_bytes
                assert (report.decode.tokens_per_s or 0) <= (best.tokens_per_s or 0) * (1 + 1e-9)
            assert (report.roofline_share or 0) <= 1 + 1e-9


KEYS = [(layer, expert) for layer in range(2) for expert in range(2)]


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 1), min_size=1)), max_size=8
    ),
    num_slots=st.integers(1, 4),
)
@example(wanted=[(0, {0, 1})] * 3, num_slots=1)
def test_the_optimum_is_that_of_trying_everything(wanted, num_slots):
    calls = [
        (i, f"decoder-{layer}", sorted(experts), []) for i, (layer, experts) in enumerate(wanted)
    ]
    trace = build(*calls, layers=("decoder-0", "decoder-1"), experts=2)
    found = optimum(trace, np.ones(len(trace), bool), num_slots)
    best = {frozenset(some): 0 for some in combinations(KEYS, num_slots)}  # loads by what is kept
    for layer, experts in wanted:
        keys = {(layer, expert) for expert in experts}
        after = {}
        for kept, loads in best.items():
            loads += len(keys - kept)
            for some in combinations(keys | kept, num_slots):
                after[frozenset(some)] = min(after.get(frozenset(some), loads), loads)
        best = after
    assert found == (sum(len(experts) for _, experts in wanted), min(best.values()))


def test_policies_share_the_same_slots_out():
    """Of 100 slots 8 are for the sweep. A step wants one expert of each of 6 decoder layers, of
    which 92 of 192 are there: 1.2 * 6 * 100 / 192 = 3.75, so 4 slots are for decoding."""
    layers = tuple(f"{stack}-{i}" for stack in ("encoder", "decoder") for i in range(6))
    plan = plan_experts(SLOT_BYTES, layers, 32, 100 * SLOT_BYTES, 4 * SLOT_BYTES)
    assert (len(plan.pinned), plan.num_decode, plan.num_sweep) == (88, 4, 8)
    plans = policy_plans(plan)
    assert plans["pinned+lru"] is plan
    for variant in plans.values():
        assert variant.num_slots == 100
        assert len(variant.host) == 4
        assert not {*variant.host} & {*variant.pinned}
    lru, pinned = plans["lru"], plans["pinned"]
    assert (len(lru.pinned), lru.num_decode, lru.num_sweep) == (0, 92, 8)
    assert (len(pinned.pinned), pinned.num_decode, pinned.num_sweep) == (96, 2, 2)
    assert len(policy_plans(plan, num_host=20)["lru"].host) == 20


def test_where_the_decoder_is_pinned_the_sweep_keeps_its_slots():
    plan = plan_experts(SLOT_BYTES, LAYERS, 6, 15 * SLOT_BYTES)
    assert (len(plan.pinned), plan.num_decode, plan.num_sweep) == (13, 0, 2)
    lru = policy_plans(plan)["lru"]
    assert (lru.num_decode, lru.num_sweep) == (12, 3)
    assert policy_plans(plan)["pinned"] == plan


def test_where_fewer_slots_for_the_sweep_pin_the_whole_decoder_it_needs_none():
    """64 experts decode. Of 70 slots the sweep has 8, so 62 are left; with 2 for it, 68 are."""
    plan = plan_experts(SLOT_BYTES, LAYERS, 32, 70 * SLOT_BYTES)
    assert (len(plan.pinned), plan.num_decode, plan.num_sweep) == (60, 2, 8)
    pinned = policy_plans(plan)["pinned"]
    assert (len(pinned.pinned), pinned.num_decode, pinned.num_sweep) == (68, 0, 2)


@given(num_slots=st.integers(2, 28), per_layer=st.integers(1, 7), rows=st.integers(1, 9))
def test_every_policy_has_slots_for_what_it_does_not_pin(num_slots, per_layer, rows):
    plan = plan_experts(SLOT_BYTES, LAYERS, per_layer, num_slots * SLOT_BYTES, rows=rows)
    for variant in policy_plans(plan).values():
        assert variant.num_slots == plan.num_slots
        pins = Counter(key.layer for key in variant.pinned)
        moving = {layer for layer in LAYERS if pins[layer] < per_layer}
        zones = {variant.zone(layer) for layer in moving}
        assert all(variant.zones[zone] >= 2 for zone in zones)
        assert all(zone in zones for zone in ("decode", "sweep") if variant.zones[zone])


def test_progress_is_told():
    told = []
    trace = generate_trace("uniform", replace(TEXTS, steps=300))
    replay(trace, small_plan(), SLOW, on_each=told.append)
    assert told == sorted(told)
    assert len(told) >= 2


@pytest.mark.parametrize(("layers", "experts"), [(LAYERS[:3], 6), (LAYERS, 5)])
def test_a_trace_of_another_model_is_refused(layers, experts):
    trace = build((0, "encoder-0", [0], []), layers=layers, experts=experts)
    message = r"the trace is of \d layers \(encoder-0 to .*, the plan of 4 layers .* of 6 experts"
    with pytest.raises(ValueError, match=message):
        replay(trace, small_plan(), SLOW)
    with pytest.raises(ValueError, match=message):
        ceiling(trace, small_plan(), SLOW)


def test_host_memory_beside_slots_needs_a_link():
    plan = small_plan(host=[("decoder-0", 1)])
    with pytest.raises(ValueError, match="so it needs a link"):
        replay(build((0, "decoder-0", [0], [])), plan, SLOW)


@pytest.mark.parametrize("name", ["disk", "memory", "link"])
@pytest.mark.parametrize("speed", [0, -1.0, float("nan")])
def test_a_machine_without_speed_is_refused(name, speed):
    with pytest.raises(ValueError, match=f"{name} is .* bytes per second; it must be above 0"):
        replace(LINKED, **{name: speed})

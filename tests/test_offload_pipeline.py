import random
import threading
from contextlib import closing, suppress
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bank import fill_bank
from offload.device import HostDevice, open_host_device
from offload.lookahead import MIN_GUESSES, Lookahead
from offload.pipeline import ExpertPipeline, Guess
from offload.planner import BudgetTooSmall, ExpertPlan, plan_experts
from offload.popularity import HALVE_EVERY, Popularity
from offload.slots import Key, SlotTable

SLOT_BYTES = 64
POISON = 0xEE


def content(key: Key) -> np.ndarray:
    """What a slot must hold for an expert."""
    seed = abs(hash(key)) % 2**32
    return np.random.default_rng(seed).integers(0, POISON, SLOT_BYTES, dtype=np.uint8)


class FakeArrival:
    """Lands when it is waited for, or earlier when the device's whim has it."""

    def __init__(self, device, slot, fill):
        self.device, self.slot, self.fill = device, slot, fill
        self.is_stopped, self.error = False, None
        self.num_waits = 0

    def finish(self):
        if self.fill is not None:
            fill, self.fill = self.fill, None
            self.device.writing.discard(self.slot)
            try:
                fill(self.device.slots[self.slot], lambda: self.is_stopped)
            except OSError as error:
                self.error = error
            if self.is_stopped:
                self.device.slots[self.slot] = POISON  # half of it may have been written

    def is_ready(self):
        if self.device.whim():
            self.finish()
        return self.fill is None

    def wait(self):
        assert not self.is_stopped
        self.num_waits += 1
        self.finish()
        if self.error is not None:
            raise self.error

    def stop(self):
        self.is_stopped = True

    def join(self):
        self.finish()

    def has_failed(self):
        assert self.fill is None
        return self.is_stopped or self.error is not None


class FakeDevice:
    """Writes as early and as late as it may: a slot is spoilt when its filling begins.

    The bytes come when they are waited for, or before, at the whim of the delays.
    """

    trust = 0.6

    def __init__(self, num_slots, delays=()):
        self.slots = np.full((num_slots, SLOT_BYTES), POISON, np.uint8)
        self.writing: set[int] = set()
        self.reading: set[int] = set()
        self.delays = list(delays)
        self.log: list[tuple[str, int]] = []
        self.started: list[FakeArrival] = []

    def whim(self):
        self.delays = self.delays[1:] + self.delays[:1]
        return bool(self.delays) and self.delays[0]

    def read(self, slot, fill, kind="read"):
        assert slot not in self.reading, "a slot is overwritten while it is read"
        assert slot not in self.writing, "a slot is filled twice at once"
        self.writing.add(slot)
        self.slots[slot] = POISON
        self.log.append((kind, slot))
        self.started.append(FakeArrival(self, slot, fill))
        return self.started[-1]

    def copy(self, slot, source):
        def fill(out, is_cancelled):
            out[:] = source

        return self.read(slot, fill, "copy")

    def adopt(self, memory):
        self.log.append(("adopt", len(memory)))

    def view(self, slot):
        assert slot not in self.writing, "a slot is read before it has arrived"
        self.reading.add(slot)
        return self.slots[slot]

    def release(self, slot):
        self.reading.remove(slot)

    def fallbacks(self):
        return ("slow",)

    def close(self):
        for arrival in self.started:
            arrival.finish()


class RefusingDevice(FakeDevice):
    """Does not begin some fillings: those at which the next of `refusals` is true."""

    def __init__(self, num_slots, delays=(), refusals=()):
        super().__init__(num_slots, delays)
        self.refusals = list(refusals)

    def read(self, slot, fill, kind="read"):
        self.refusals = self.refusals[1:] + self.refusals[:1]
        if self.refusals and self.refusals[-1]:
            raise RuntimeError("cannot schedule new futures")
        return super().read(slot, fill, kind)


class Trusting(Lookahead):
    """Believes every guess."""

    def is_trusted(self, layer):
        return True


def fake_read(key, out, is_cancelled=lambda: False):
    out[:] = content(key)


def make_plan(num_slots=0, *, layers=("a", "b", "c"), experts=8, pinned=(), sweep=0, host=()):
    """A plan by hand: what is not pinned and not for the sweep decodes."""
    return ExpertPlan(
        slot_bytes=SLOT_BYTES,
        layers=tuple(layers),
        experts_per_layer=experts,
        num_decode=num_slots - len(pinned) - sweep,
        num_sweep=sweep,
        pinned=tuple(pinned),
        host=tuple(host),
    )


def make_pipeline(plan, delays=(), read=fake_read, bank=None):
    device = FakeDevice(plan.num_slots, delays)
    pipeline = ExpertPipeline(device, plan, read, bank)
    pipeline.preload()
    return device, pipeline


def borrow(device, pipeline, layer, wanted, guess=None) -> list[int]:
    """Run a loop over the wanted experts; check every slot at the beginning and end of its body."""
    order = []
    for expert, blob in pipeline.stream(layer, wanted, guess):
        np.testing.assert_array_equal(blob, content(Key(layer, expert)))
        for arrival in device.started[-2:]:
            arrival.finish()  # what is on its way may land at any time
        np.testing.assert_array_equal(blob, content(Key(layer, expert)))
        order.append(expert)
    assert not device.reading
    return order


LAYER_NAMES = ["encoder-0", "encoder-1", "decoder-0", "decoder-1"]
EXPERTS = st.lists(st.integers(0, 7), unique=True, min_size=1)
STEP = st.tuples(
    st.sampled_from(LAYER_NAMES),
    EXPERTS,
    st.one_of(st.none(), st.tuples(st.sampled_from(LAYER_NAMES), EXPERTS)),
)
STEPS = st.lists(STEP, min_size=1, max_size=12)
LEFT_EARLY = st.tuples(STEP, st.integers(0, 9))  # and how many are lent before the loop ends


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    budget=st.integers(2, 34),
    num_host=st.integers(0, 20),
    delays=st.lists(st.booleans(), max_size=40),
)
def test_every_wanted_expert_is_lent_once_and_never_overwritten(steps, budget, num_host, delays):
    plan = plan_experts(SLOT_BYTES, LAYER_NAMES, 8, budget * SLOT_BYTES, num_host * SLOT_BYTES)
    bank_device = FakeDevice(1)
    bank = fill_bank(plan.host, SLOT_BYTES, fake_read, bank_device) if plan.host else None
    device, pipeline = make_pipeline(plan, delays, bank=bank)
    pipeline.lookahead = Trusting(0.6)
    wanted_in_all = 0
    for layer, wanted, guess in steps:
        order = borrow(device, pipeline, layer, wanted, guess and Guess(*guess))
        assert sorted(order) == sorted(wanted)
        assert len(pipeline._table.in_zone("pinned")) == len(plan.pinned)
        assert len(pipeline.resident()) <= plan.num_slots
        wanted_in_all += len(wanted)
    stats = pipeline.stats
    assert stats.hits + stats.misses == wanted_in_all
    assert stats.prefetch_used + stats.prefetch_wasted <= stats.prefetched
    assert stats.read_bytes + stats.copied_bytes <= (stats.misses + stats.prefetched) * SLOT_BYTES
    assert stats.copied_bytes == stats.host_loads * SLOT_BYTES
    assert len([entry for entry in device.log if entry[0] == "copy"]) >= stats.host_loads


def check_state(pipeline, plan):
    """Between two streams: held is what comes on a guess, and no slot and no expert is lost."""
    table, coming, landed = pipeline._table, pipeline._coming, pipeline._landed
    assert table._holds == dict.fromkeys(coming, 1)
    assert pipeline.resident() >= {*coming, *landed}
    assert not {*coming} & {*landed}
    slots = [table.slot(key) for key in pipeline.resident()]
    slots += [slot for free in table._free.values() for slot in free]
    slots += [slot for slot, _, _ in pipeline._ending]
    assert sorted(slots) == list(range(plan.num_slots))


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(LEFT_EARLY, max_size=12),
    budget=st.integers(2, 34),
    num_host=st.sampled_from([0, 12]),
    delays=st.lists(st.booleans(), max_size=20),
    refusals=st.lists(st.sampled_from([False, False, True]), max_size=9),
    broken=st.sets(st.builds(Key, st.sampled_from(LAYER_NAMES), st.integers(0, 7)), max_size=3),
)
def test_whatever_happened_nothing_stays_held_and_nothing_is_taken_for_there(
    steps, budget, num_host, delays, refusals, broken
):
    """Loops end early, reads fail or do not even begin; in the end everybody is served all."""

    failing = set()

    def read(key, out, is_cancelled):
        if key in failing:
            raise OSError(5, "Input/output error")
        fake_read(key, out)

    plan = plan_experts(SLOT_BYTES, LAYER_NAMES, 8, budget * SLOT_BYTES, num_host * SLOT_BYTES)
    bank = fill_bank(plan.host, SLOT_BYTES, fake_read, FakeDevice(1)) if plan.host else None
    device = RefusingDevice(plan.num_slots, delays)
    pipeline = ExpertPipeline(device, plan, read, bank)
    pipeline.lookahead = Trusting(0.6)
    pipeline.preload()
    failing |= broken
    check_state(pipeline, plan)
    device.refusals = list(refusals)
    for (layer, wanted, guess), num_lent in steps:
        with suppress(OSError, RuntimeError):
            stream = pipeline.stream(layer, wanted, guess and Guess(*guess))
            with closing(stream):
                for expert, blob in islice(stream, num_lent):
                    np.testing.assert_array_equal(blob, content(Key(layer, expert)))
        assert not device.reading
        assert len(pipeline._table.in_zone("pinned")) == len(plan.pinned)
        check_state(pipeline, plan)
    device.refusals = []
    failing.clear()
    for layer in LAYER_NAMES:
        assert sorted(borrow(device, pipeline, layer, list(range(8)))) == list(range(8))
        check_state(pipeline, plan)


class WatchedTable(SlotTable):
    """Tells which experts were given a slot, and which lost theirs, in order."""

    def __init__(self, zones):
        super().__init__(zones)
        self.log: list[tuple[str, Key]] = []

    def take(self, key, zone):
        slot = super().take(key, zone)
        if slot is not None:
            self.log.append(("take", key))
        return slot

    def detach(self, key):
        self.log.append(("detach", key))
        return super().detach(key)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(LEFT_EARLY, max_size=20),
    budget=st.integers(4, 31),
    delays=st.lists(st.booleans(), max_size=20),
)
def test_what_was_fetched_on_a_guess_is_used_wasted_or_still_there(steps, budget, delays):
    """What got a slot while another layer computed was fetched on a guess.

    It is used if it is wanted before it loses the slot, else wasted once it does.
    """
    plan = plan_experts(SLOT_BYTES, LAYER_NAMES, 8, budget * SLOT_BYTES)
    pipeline = ExpertPipeline(FakeDevice(plan.num_slots, delays), plan, fake_read)
    pipeline._table = WatchedTable(plan.zones)
    pipeline.lookahead = Trusting(0.6)
    pipeline.preload()
    log = pipeline._table.log
    there: set[Key] = set()
    prefetched = used = wasted = 0
    for (layer, wanted, guess), num_lent in steps:
        log.clear()
        is_apart = guess is not None and guess[0] != layer
        stream = pipeline.stream(layer, wanted, Guess(*guess) if is_apart else None)
        with closing(stream):
            lent = list(islice(stream, num_lent))
        if lent:
            right = there.intersection(Key(layer, expert) for expert in wanted)
            used += len(right)
            there -= right
        for event, key in log:
            if event == "take" and key.layer != layer:
                prefetched += 1
                there.add(key)
            elif event == "detach" and key in there:
                wasted += 1
                there.remove(key)
        stats = pipeline.stats
        told = (stats.prefetched, stats.prefetch_used, stats.prefetch_wasted)
        assert told == (prefetched, used, wasted)


def test_residents_come_first_then_what_has_arrived():
    device, pipeline = make_pipeline(make_plan(6, pinned=[Key("a", 5)]))
    stream = pipeline.stream("a", [0, 1, 2, 5])
    order = [next(stream)[0]]
    device.started[-1].finish()  # expert 2 is there before 0 and 1
    order += [expert for expert, _ in stream]
    assert order == [5, 2, 0, 1]


def test_a_scan_over_all_experts_hits_its_pinned_share_where_plain_lru_hits_nothing():
    layers, experts = ["a", "b", "c"], 8
    rates = {}
    for pinned in (0, 9):
        pins = [Key(layer, e) for e in range(3) for layer in layers][:pinned]
        _, pipeline = make_pipeline(make_plan(12, pinned=pins))
        for _ in range(5):
            for layer in layers:
                for _ in pipeline.stream(layer, list(range(experts))):
                    pass
        rates[pinned] = pipeline.stats.hit_rate
    assert rates[0] == 0
    assert rates[9] == pytest.approx(9 / 24)


def test_the_sweep_of_the_encoder_never_evicts_what_decoding_goes_on_with():
    plan = make_plan(6, layers=LAYER_NAMES, sweep=2)
    device, pipeline = make_pipeline(plan)
    borrow(device, pipeline, "decoder-0", [0, 1])
    borrow(device, pipeline, "decoder-1", [0, 1])
    for layer in ("encoder-0", "encoder-1"):
        borrow(device, pipeline, layer, list(range(8)))
    before = pipeline.stats
    borrow(device, pipeline, "decoder-0", [0, 1])
    borrow(device, pipeline, "decoder-1", [0, 1])
    assert (pipeline.stats - before).hits == 4


def test_when_everything_fits_nothing_is_read_twice():
    _, pipeline = make_pipeline(make_plan(4))
    for _ in range(3):
        list(pipeline.stream("a", [3, 1, 0, 2]))
    assert (pipeline.stats.misses, pipeline.stats.hits, pipeline.stats.evictions) == (4, 8, 0)


@pytest.mark.parametrize("num_lent", [0, 1, 2, 3])
def test_a_loop_left_early_leaves_nothing_held(num_lent):
    device, pipeline = make_pipeline(make_plan(3))
    list(pipeline.stream("a", [0, 1]))
    stream = pipeline.stream("a", [0, 4, 5, 6])
    for _ in range(num_lent):
        next(stream)
    stream.close()
    assert sorted(borrow(device, pipeline, "b", [0, 1, 2, 3, 4])) == [0, 1, 2, 3, 4]
    assert sorted(borrow(device, pipeline, "a", [0, 4, 5])) == [0, 4, 5]


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_a_read_that_fails_is_raised_and_the_next_step_is_served(broken):
    failing = {Key("a", broken)}

    def read(key, out, is_cancelled):
        if key in failing:
            raise OSError(5, "Input/output error")
        fake_read(key, out)

    device, pipeline = make_pipeline(make_plan(3), read=read)
    with pytest.raises(OSError, match="Input/output"):
        list(pipeline.stream("a", [0, 1, 2, 3, 4]))
    assert Key("a", broken) not in pipeline.resident()
    failing.clear()
    assert borrow(device, pipeline, "a", [4, 3, 2, 1, 0])


def test_an_error_in_the_loop_body_leaves_nothing_held():
    device, pipeline = make_pipeline(make_plan(2))

    def body():
        for _ in pipeline.stream("a", [0, 1, 2]):
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        body()
    assert sorted(borrow(device, pipeline, "b", [0, 1, 2])) == [0, 1, 2]


def test_a_failed_preload_is_raised_and_ends_what_is_on_its_way():
    def read(key, out, is_cancelled):
        if key.expert == 1:
            raise OSError(5, "Input/output error")
        fake_read(key, out)

    with pytest.raises(OSError, match="Input/output"):
        make_pipeline(make_plan(6, pinned=[Key("a", e) for e in range(4)]), read=read)


def test_a_preload_that_does_not_begin_leaves_nothing_held():
    plan = make_plan(6, pinned=[Key("a", e) for e in range(4)])
    device = RefusingDevice(6, refusals=[False, True])
    pipeline = ExpertPipeline(device, plan, fake_read)
    with pytest.raises(RuntimeError, match="cannot schedule"):
        pipeline.preload()
    assert pipeline.resident() == set()
    check_state(pipeline, plan)


def test_preloading_tells_its_progress_and_counts_as_nothing():
    plan = make_plan(5, pinned=[Key("a", 0), Key("b", 0), Key("a", 1)])
    pipeline = ExpertPipeline(FakeDevice(5), plan, fake_read)
    told = []
    pipeline.preload(told.append)
    assert told == [1, 2, 3]
    assert pipeline.stats.misses == 0
    assert pipeline.stats.hit_rate == 0
    assert pipeline.fallbacks == ("slow",)


def test_slots_need_a_number():
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable({"pinned": 0, "decode": 0})


def trusting(plan, delays=(), read=fake_read):
    device, pipeline = make_pipeline(plan, delays, read)
    pipeline.lookahead = Trusting(0.6)
    return device, pipeline


def test_a_right_guess_that_has_landed_is_a_hit():
    device, pipeline = trusting(make_plan(4), delays=[True])
    borrow(device, pipeline, "a", [0], Guess("b", [3]))
    borrow(device, pipeline, "b", [3])
    stats = pipeline.stats
    assert (stats.hits, stats.misses) == (1, 1)
    assert (stats.prefetched, stats.prefetch_used, stats.prefetch_wasted) == (1, 1, 0)
    assert stats.read_bytes == 2 * SLOT_BYTES


def test_a_right_guess_on_its_way_is_joined_and_not_read_again():
    device, pipeline = trusting(make_plan(4))
    for _ in pipeline.stream("a", [0], Guess("b", [3])):
        pass
    assert [expert for expert, _ in pipeline.stream("b", [3])] == [3]
    assert len(device.started) == 2
    stats = pipeline.stats
    assert (stats.misses, stats.prefetch_used) == (2, 1)


def test_a_guess_that_has_landed_is_waited_for_when_it_is_first_lent_and_goes_last():
    """Its bytes may still be on the link; residents need not wait for that."""
    device, pipeline = trusting(make_plan(6), delays=[True])
    borrow(device, pipeline, "b", [5])
    borrow(device, pipeline, "a", [0], Guess("b", [3]))
    arrival = device.started[-1]
    borrow(device, pipeline, "c", [1])
    assert arrival.num_waits == 0
    assert borrow(device, pipeline, "b", [3, 5]) == [5, 3]
    assert arrival.num_waits == 1
    assert borrow(device, pipeline, "b", [3, 5]) == [3, 5]
    assert arrival.num_waits == 1


def test_a_guess_that_landed_and_cannot_be_waited_for_is_not_lent():
    """On a GPU: computations could not be made to wait for the copy. The next try waits again."""
    device, pipeline = trusting(make_plan(6), delays=[True])
    borrow(device, pipeline, "a", [0], Guess("b", [3]))
    borrow(device, pipeline, "c", [1])
    device.started[1].error = OSError(5, "Input/output error")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            borrow(device, pipeline, "b", [3, 4])
        assert pipeline._table._holds == {}
    device.started[1].error = None
    assert borrow(device, pipeline, "b", [3]) == [3]


def test_a_guess_that_was_evicted_before_it_was_lent_is_read_anew():
    device, pipeline = trusting(make_plan(2), delays=[True])
    borrow(device, pipeline, "a", [0], Guess("b", [3]))
    borrow(device, pipeline, "c", [1, 2])
    before = len(device.started)
    assert borrow(device, pipeline, "b", [3]) == [3]
    assert len(device.started) == before + 1
    assert pipeline.stats.prefetch_wasted == 1


def test_a_guess_names_residents_that_do_not_make_room_and_are_let_go_again():
    """Expert 0 of b was used longest ago; not held it would go for 1, and be read again."""
    device, pipeline = trusting(make_plan(3))
    borrow(device, pipeline, "b", [0])
    borrow(device, pipeline, "c", [5])
    borrow(device, pipeline, "a", [0], Guess("b", [1, 0]))
    assert pipeline.resident() == {Key("b", 0), Key("a", 0), Key("b", 1)}
    assert len(device.started) == 4
    assert borrow(device, pipeline, "c", [1, 2, 3]) == [1, 2, 3]  # all slots, so none is held


@pytest.mark.parametrize("refused", [0, 1])
def test_a_filling_that_does_not_begin_leaves_nothing_held(refused):
    """Neither what was wanted nor, of a guess, what is there or was to come."""
    plan = make_plan(5)
    device = RefusingDevice(5)
    pipeline = ExpertPipeline(device, plan, fake_read)
    pipeline.lookahead = Trusting(0.6)
    borrow(device, pipeline, "b", [0])
    device.refusals = [False] * refused + [True] + [False] * 9
    with pytest.raises(RuntimeError, match="cannot schedule"):
        borrow(device, pipeline, "a", [7], Guess("b", [0, 1]))
    check_state(pipeline, plan)
    assert Key("b", 1) not in pipeline.resident()
    assert (Key("a", 7) in pipeline.resident()) == bool(refused)
    assert pipeline.stats.prefetched == 0
    assert sorted(borrow(device, pipeline, "a", [7, 1, 2, 3, 4])) == [1, 2, 3, 4, 7]


def test_a_wrong_guess_is_stopped_and_never_taken_for_an_expert():
    device, pipeline = trusting(make_plan(4))
    for _ in pipeline.stream("a", [0], Guess("b", [3])):
        pass
    assert not device.started[-1].is_stopped
    assert borrow(device, pipeline, "b", [2]) == [2]
    assert device.started[1].is_stopped
    assert borrow(device, pipeline, "b", [3]) == [3]
    assert pipeline.stats.prefetch_wasted == 1


def test_demand_goes_before_guesses_and_a_guess_waits_until_nothing_is_wanted():
    device, pipeline = trusting(make_plan(6))
    stream = pipeline.stream("a", [0, 1, 2], Guess("b", [3, 4]))
    begun = []
    for _ in stream:
        begun.append(len(device.started))
    assert begun == [3, 3, 5]  # the last one wanted is there: two guesses begin


def test_a_guess_takes_no_slot_that_is_in_use_or_pinned():
    plan = make_plan(4, pinned=[Key("b", 0), Key("b", 1)])
    device, pipeline = trusting(plan)
    stream = pipeline.stream("a", [5], Guess("b", [0, 2, 3, 4]))
    next(stream)
    assert pipeline.resident() == {Key("b", 0), Key("b", 1), Key("a", 5), Key("b", 2)}
    stream.close()


def test_a_guess_that_cannot_be_read_harms_nobody_until_it_is_wanted():
    def read(key, out, is_cancelled):
        if key == Key("b", 3):
            raise OSError(5, "Input/output error")
        fake_read(key, out)

    device, pipeline = trusting(make_plan(4), delays=[True], read=read)
    borrow(device, pipeline, "a", [0], Guess("b", [3]))
    assert borrow(device, pipeline, "b", [2]) == [2]
    with pytest.raises(OSError, match="Input/output"):
        borrow(device, pipeline, "b", [3])


def test_guesses_are_asked_for_only_where_experts_move():
    plan = make_plan(10, pinned=[Key("a", e) for e in range(8)])
    _, pipeline = make_pipeline(plan)
    assert not pipeline.wants_guess("a")
    assert pipeline.wants_guess("b")


def judged(lookahead, layer, guesses, wanted):
    for guess in guesses:
        lookahead.note(layer, guess)
        lookahead.judge(layer, wanted)


def test_guesses_are_believed_once_they_have_been_right_and_no_longer_when_they_fail():
    lookahead = Lookahead(0.6)
    judged(lookahead, "a", [[1, 2]] * (MIN_GUESSES - 1), [1, 2, 3])
    assert not lookahead.is_trusted("a")
    judged(lookahead, "a", [[1, 2]], [1, 2, 3])
    assert lookahead.is_trusted("a")
    assert not lookahead.is_trusted("b")
    judged(lookahead, "a", [[7, 8]] * 16, [1, 2, 3])
    assert not lookahead.is_trusted("a")
    assert 0 < lookahead.precisions()["a"] < 0.6


def test_a_layer_that_is_not_trusted_is_asked_now_and_then():
    lookahead = Lookahead(0.6)
    assert all(lookahead.is_asked("a") for _ in range(5))  # new: every time
    judged(lookahead, "a", [[7]] * MIN_GUESSES, [1])
    assert sum(lookahead.is_asked("a") for _ in range(64)) == 4


def test_a_layer_without_a_guess_is_not_judged():
    lookahead = Lookahead(0.6)
    lookahead.judge("a", [1])
    lookahead.note("a", [])
    lookahead.judge("a", [1])
    assert lookahead.precisions() == {}


def test_host_memory_is_adopted_in_pieces_once_it_is_filled(monkeypatch):
    device = FakeDevice(1)
    keys = [Key("a", e) for e in range(7)]
    monkeypatch.setattr("offload.bank.GRANULE_BYTES", 3 * SLOT_BYTES)
    told = []
    bank = fill_bank(keys, SLOT_BYTES, fake_read, device, told.append)
    assert device.log == [("adopt", 3), ("adopt", 3), ("adopt", 1)]
    assert told == list(range(1, 8))
    assert len(bank) == 7
    np.testing.assert_array_equal(bank.get(Key("a", 6)), content(Key("a", 6)))
    assert bank.get(Key("b", 0)) is None


def test_a_bank_that_cannot_be_read_is_told():
    def read(key, out):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        fill_bank([Key("a", 0)], SLOT_BYTES, read, FakeDevice(1))


@pytest.fixture
def host():
    device = open_host_device(4096, 3)
    yield device
    device.close()


def test_host_slots_are_aligned_and_filled_by_readers(host: HostDevice):
    def fill(out, is_cancelled):
        assert threading.current_thread().name.startswith("experts")
        assert not is_cancelled()
        out[:] = 7

    arrival = host.read(1, fill)
    arrival.wait()
    assert arrival.is_ready()
    assert not arrival.has_failed()
    assert host.view(1).ctypes.data % 4096 == 0
    assert (host.view(1) == 7).all()
    assert (host.view(0) == 0).all()
    host.release(1)
    host.copy(0, host.view(1)).wait()
    assert (host.view(0) == 7).all()
    host.adopt(host.view(0))
    assert host.fallbacks() == ()


def test_a_host_reader_that_fails_tells_who_waits(host):
    def fill(out, is_cancelled):
        raise OSError(5, "Input/output error")

    arrival = host.read(0, fill)
    arrival.join()
    assert arrival.has_failed()
    with pytest.raises(OSError, match="Input/output"):
        arrival.wait()


def test_stopping_does_not_block_and_ends_with_nobody_writing(host):
    begun, go_on, done = threading.Barrier(3), threading.Event(), []

    def slow(out, is_cancelled):
        begun.wait(300)
        assert go_on.wait(300)
        done.append(is_cancelled())

    first = [host.read(slot, slow) for slot in (0, 1)]  # both readers are busy
    queued = host.read(2, lambda out, is_cancelled: done.append("never"))
    begun.wait(300)
    queued.stop()
    queued.join()
    assert queued.has_failed()
    first[0].stop()
    assert not first[0].is_ready()
    go_on.set()
    for arrival in first:
        arrival.join()
    assert sorted(done) == [False, True]


def test_memory_that_is_not_to_be_had_is_told():
    with pytest.raises(MemoryError, match="bytes for 1000000 experts are not to be had"):
        open_host_device(2**40, 10**6)


LAYERS = ["encoder-0", "encoder-1", "decoder-0", "decoder-1"]


def test_decoder_layers_are_pinned_first_and_evenly():
    plan = plan_experts(100, LAYERS, 4, 10 * 100)
    assert (plan.num_slots, plan.num_decode, plan.num_sweep, plan.arena_bytes) == (10, 0, 2, 1000)
    assert plan.pinned == tuple(
        Key(f"decoder-{layer}", expert) for expert in range(4) for layer in range(2)
    )
    less = plan_experts(100, LAYERS, 4, 9 * 100)
    assert (less.num_decode, less.num_sweep, len(less.pinned)) == (2, 2, 5)
    more = plan_experts(100, LAYERS, 4, 12 * 100)
    assert more.pinned[8:] == (Key("encoder-0", 0), Key("encoder-1", 0))
    assert (less.zone("encoder-0"), less.zone("decoder-1")) == ("sweep", "decode")


def test_all_experts_are_pinned_if_they_fit():
    plan = plan_experts(100, LAYERS, 4, 10**9, 10**9)
    assert (plan.num_slots, len(plan.pinned), plan.num_decode, plan.num_sweep) == (16, 16, 0, 0)
    assert (plan.num_disk, plan.host) == (0, ())


def test_the_smallest_budget_streams_everything():
    plan = plan_experts(100, LAYERS, 4, 299)
    assert (plan.num_slots, plan.pinned) == (2, ())
    assert plan.zone("encoder-0") == plan.zone("decoder-0") == "decode"


def test_what_is_not_pinned_waits_in_host_memory_as_far_as_it_reaches():
    plan = plan_experts(100, LAYERS, 4, 900, 500)
    assert plan.host == (
        Key("decoder-1", 2),
        Key("decoder-0", 3),
        Key("decoder-1", 3),
        Key("encoder-0", 0),
        Key("encoder-1", 0),
    )
    assert (plan.num_disk, plan.host_bytes) == (16 - 5 - 5, 500)


DEEP = [f"{stack}-{i}" for stack in ("encoder", "decoder") for i in range(24)]


@pytest.mark.parametrize(
    ("num_slots", "rows", "decode", "sweep"),
    [
        (206, 1, 22, 8),  # 198 left, and 1.2 * 24 * (1 - 198 / 768) = 21.4
        (206, 2, 43, 8),  # two rows want 1.97 of 32 in a layer: 42.1
        (206, 4, 22, 8),  # 81.6 would be more than a quarter of 198: as for one row
        (206, 1000, 22, 8),
        (776 - 3, 1, 2, 8),  # 765 left; 0.1
        (776, 1, 0, 8),  # the whole decoder is pinned
        (114, 1, 25, 8),  # 106 left; 24.8, of at most 26.5
        (108, 1, 2, 8),  # 100 left; 25.05 would be more than a quarter
        (63, 1, 2, 7),  # an eighth
        (4, 1, 2, 2),
        (3, 1, 3, 0),  # both stacks share
    ],
)
def test_slots_to_pass_through_are_counted_by_what_a_step_moves(num_slots, rows, decode, sweep):
    """24 + 24 layers of 32 experts; a step of one row wants 24 experts of 768."""
    plan = plan_experts(100, DEEP, 32, num_slots * 100, rows=rows)
    assert (plan.num_decode, plan.num_sweep) == (decode, sweep)
    assert len(plan.pinned) == num_slots - decode - sweep


@given(
    budget=st.integers(2, 1600), rows=st.integers(1, 64), layers=st.sampled_from([DEEP, DEEP[24:]])
)
def test_most_slots_are_pinned_and_the_sweep_has_few(budget, rows, layers):
    plan = plan_experts(100, layers, 32, budget * 100, rows=rows)
    assert plan.num_sweep <= 8
    assert plan.num_decode <= max(2, plan.num_slots / 4) or plan.num_slots < 4
    assert (plan.num_sweep > 0) == (4 <= plan.num_slots < plan.num_experts and layers is DEEP)


@given(
    budget=st.integers(2, 40),
    host=st.integers(0, 40),
    per_layer=st.integers(2, 9),
    rows=st.integers(1, 9),
)
def test_no_plan_exceeds_its_budgets_or_places_an_expert_twice(budget, host, per_layer, rows):
    plan = plan_experts(100, LAYERS, per_layer, budget * 100, host * 100, rows=rows)
    assert plan.arena_bytes <= budget * 100
    assert plan.host_bytes <= host * 100
    assert len({*plan.pinned, *plan.host}) == len(plan.pinned) + len(plan.host)
    assert plan.num_disk >= 0
    for layer in LAYERS:  # whatever is not pinned has slots to pass through
        whole = all(Key(layer, e) in plan.pinned for e in range(per_layer))
        assert whole or plan.zones[plan.zone(layer)] >= 2


def test_a_budget_that_is_too_small_does_the_sum():
    with pytest.raises(BudgetTooSmall, match="199 bytes hold 1 experts of 100 bytes; .* 200 bytes"):
        plan_experts(100, LAYERS, 4, 199)


def test_pins_go_to_what_is_wanted_clearly_more_often_and_no_bytes_move():
    """Two of eight experts are wanted nine times of ten, and were not pinned at first."""
    plan = make_plan(6, layers=("decoder-0",), pinned=[Key("decoder-0", e) for e in range(4)])
    device, pipeline = make_pipeline(plan)
    choose = random.Random(3)
    for _ in range(300):
        hot = choose.random() < 0.9
        borrow(device, pipeline, "decoder-0", [choose.choice([6, 7] if hot else list(range(6)))])
    reads = len(device.log)
    before = pipeline.stats
    assert before.repinned >= 2
    assert {Key("decoder-0", 6), Key("decoder-0", 7)} <= set(pipeline._table.in_zone("pinned"))
    assert len(pipeline._table.in_zone("pinned")) == 4
    for _ in range(20):  # even a scan over all the others does not drive them out
        borrow(device, pipeline, "decoder-0", [0, 1, 2, 3, 4, 5])
    assert borrow(device, pipeline, "decoder-0", [6, 7]) == [6, 7]
    assert (pipeline.stats - before).hits >= 2
    assert len(device.log) - reads == (pipeline.stats - before).misses


@pytest.mark.parametrize("num_host", [0, 4])
def test_pins_stay_where_all_are_wanted_alike_or_placement_is_exclusive(num_host):
    layers = ["decoder-0", "decoder-1"]
    pins = [Key(layer, e) for e in range(3) for layer in layers]
    host = [Key("decoder-0", e) for e in range(3, 3 + num_host)]
    plan = make_plan(9, layers=layers, pinned=pins, host=host)
    bank = fill_bank(plan.host, SLOT_BYTES, fake_read, FakeDevice(1)) if host else None
    device, pipeline = make_pipeline(plan, bank=bank)
    for step in range(60):
        for layer in layers:
            wanted = [7] if num_host and step % 2 else list(range(8))
            borrow(device, pipeline, layer, wanted)
    assert pipeline.stats.repinned == 0
    assert set(pipeline._table.in_zone("pinned")) == set(pins)


def test_wants_of_long_ago_count_for_less():
    popularity = Popularity()
    old, new = Key("a", 0), Key("a", 1)
    for _ in range(HALVE_EVERY // 2):
        popularity.note([old])
    halved = [popularity.note([new]) for _ in range(HALVE_EVERY // 2)]
    assert halved == [False] * (len(halved) - 1) + [True]
    assert popularity.count(old) == HALVE_EVERY / 4
    assert popularity.count(new) == pytest.approx(HALVE_EVERY / 4, abs=1)
    assert not popularity.deserves(new, popularity.count(old))
    assert popularity.count(Key("a", 9)) == 0.0

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.device import HostDevice, open_host_device
from offload.pipeline import ExpertPipeline
from offload.planner import BudgetTooSmall, plan_experts
from offload.slots import Key, SlotTable

SLOT_BYTES = 64
POISON = 0xEE


def content(key: Key) -> np.ndarray:
    """What a slot must hold for an expert."""
    seed = abs(hash(key)) % 2**32
    return np.random.default_rng(seed).integers(0, POISON, SLOT_BYTES, dtype=np.uint8)


class FakeArrival:
    def __init__(self, device, slot, fill):
        self.device, self.slot, self.fill = device, slot, fill
        self.error = None

    def finish(self):
        if self.fill is not None:
            fill, self.fill = self.fill, None
            self.device.writing.discard(self.slot)
            try:
                fill(self.device.slots[self.slot])
            except OSError as error:
                self.error = error

    def wait(self):
        self.finish()
        if self.error is not None:
            raise self.error

    def cancel(self):
        self.fill = None
        self.device.writing.discard(self.slot)


class FakeDevice:
    """Writes as early and as late as it may: a slot is spoilt when its filling begins.

    The bytes come when they are waited for, or before, at the whim of the delays.
    """

    def __init__(self, num_slots, delays=()):
        self.slots = np.full((num_slots, SLOT_BYTES), POISON, np.uint8)
        self.writing: set[int] = set()
        self.reading: set[int] = set()
        self.delays = list(delays)
        self.started: list[FakeArrival] = []

    def start(self, slot, fill):
        assert slot not in self.reading, "a slot is overwritten while it is read"
        assert slot not in self.writing, "a slot is filled twice at once"
        self.writing.add(slot)
        self.slots[slot] = POISON
        self.started.append(FakeArrival(self, slot, fill))
        if self.delays and self.delays.pop():  # something earlier arrives meanwhile
            self.started[len(self.delays) % len(self.started)].finish()
        return self.started[-1]

    def view(self, slot):
        assert slot not in self.writing, "a slot is read before it has arrived"
        return self.slots[slot]

    def close(self):
        pass


def fake_read(key, out):
    out[:] = content(key)


def borrow(
    device: FakeDevice, pipeline: ExpertPipeline, layer: str, wanted: list[int]
) -> list[int]:
    """Run a loop over the wanted experts; check every slot at the beginning and end of its body."""
    order = []
    for expert, blob in pipeline.stream(layer, wanted):
        slot = next(i for i, row in enumerate(device.slots) if np.shares_memory(row, blob))
        device.reading.add(slot)
        np.testing.assert_array_equal(blob, content(Key(layer, expert)))
        for arrival in device.started[-2:]:
            arrival.finish()  # what is on its way may land at any time
        np.testing.assert_array_equal(blob, content(Key(layer, expert)))
        device.reading.discard(slot)
        order.append(expert)
    return order


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]), st.lists(st.integers(0, 7), unique=True, min_size=1)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    steps=STEPS,
    num_slots=st.integers(2, 26),
    num_pinned=st.integers(0, 24),
    delays=st.lists(st.booleans(), max_size=40),
)
def test_every_wanted_expert_is_lent_once_and_never_overwritten(
    steps, num_slots, num_pinned, delays
):
    device = FakeDevice(num_slots, delays)
    pipeline = ExpertPipeline(device, num_slots, SLOT_BYTES, fake_read)
    pins = [Key(layer, e) for e in range(8) for layer in "abc"][: min(num_pinned, num_slots - 2)]
    pipeline.preload(pins)
    wanted_in_all = 0
    for layer, wanted in steps:
        before = {key.expert for key in pipeline.resident() if key.layer == layer}
        order = borrow(device, pipeline, layer, wanted)
        assert sorted(order) == sorted(wanted)
        hits = [expert for expert in wanted if expert in before]
        assert order[: len(hits)] == hits  # residents first, both parts in the order asked for
        assert order[len(hits) :] == [expert for expert in wanted if expert not in before]
        assert set(pins) <= pipeline.resident()
        wanted_in_all += len(wanted)
    stats = pipeline.stats
    assert stats.hits + stats.misses == wanted_in_all
    assert stats.read_bytes == stats.misses * SLOT_BYTES


def test_a_scan_over_all_experts_hits_its_pinned_share_where_plain_lru_hits_nothing():
    layers, experts = ["a", "b", "c"], 8
    rates = {}
    for pinned in (0, 9):
        pipeline = ExpertPipeline(FakeDevice(12), 12, SLOT_BYTES, fake_read)
        pipeline.preload([Key(layer, e) for e in range(3) for layer in layers][:pinned])
        for _ in range(5):
            for layer in layers:
                for _ in pipeline.stream(layer, list(range(experts))):
                    pass
        rates[pinned] = pipeline.stats.hit_rate
    assert rates[0] == 0
    assert rates[9] == pytest.approx(9 / 24)


def test_when_everything_fits_nothing_is_read_twice():
    pipeline = ExpertPipeline(FakeDevice(4), 4, SLOT_BYTES, fake_read)
    for _ in range(3):
        list(pipeline.stream("a", [3, 1, 0, 2]))
    assert (pipeline.stats.misses, pipeline.stats.hits, pipeline.stats.evictions) == (4, 8, 0)


@pytest.mark.parametrize("num_lent", [0, 1, 2, 3])
def test_a_loop_left_early_leaves_nothing_held(num_lent):
    device = FakeDevice(3)
    pipeline = ExpertPipeline(device, 3, SLOT_BYTES, fake_read)
    list(pipeline.stream("a", [0, 1]))
    stream = pipeline.stream("a", [0, 4, 5, 6])
    for _ in range(num_lent):
        next(stream)
    stream.close()
    assert not device.writing
    assert sorted(borrow(device, pipeline, "b", [0, 1, 2, 3, 4])) == [0, 1, 2, 3, 4]
    assert sorted(borrow(device, pipeline, "a", [0, 4, 5])) == [0, 4, 5]


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_a_read_that_fails_is_raised_and_the_next_step_is_served(broken):
    device = FakeDevice(3)
    failing = {Key("a", broken)}

    def read(key, out):
        if key in failing:
            raise OSError(5, "Input/output error")
        fake_read(key, out)

    pipeline = ExpertPipeline(device, 3, SLOT_BYTES, read)
    with pytest.raises(OSError, match="Input/output"):
        list(pipeline.stream("a", [0, 1, 2, 3, 4]))
    assert Key("a", broken) not in pipeline.resident()
    failing.clear()
    assert borrow(device, pipeline, "a", [4, 3, 2, 1, 0])


def test_an_error_in_the_loop_body_leaves_nothing_held():
    device = FakeDevice(2)
    pipeline = ExpertPipeline(device, 2, SLOT_BYTES, fake_read)

    def body():
        for _ in pipeline.stream("a", [0, 1, 2]):
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        body()
    assert sorted(borrow(device, pipeline, "b", [0, 1, 2])) == [0, 1, 2]


def test_more_pins_than_slots_are_refused():
    pipeline = ExpertPipeline(FakeDevice(2), 2, SLOT_BYTES, fake_read)
    with pytest.raises(ValueError, match="3 experts to pin, but 2 slots"):
        pipeline.preload([Key("a", e) for e in range(3)])


def test_preloading_tells_its_progress_and_counts_as_nothing():
    pipeline = ExpertPipeline(FakeDevice(4), 4, SLOT_BYTES, fake_read)
    told = []
    pipeline.preload([Key("a", 0), Key("b", 0), Key("a", 1)], told.append)
    assert told == [1, 2, 3]
    assert pipeline.stats.misses == 0
    assert pipeline.stats.hit_rate == 0


def test_slots_need_a_number():
    with pytest.raises(ValueError, match="num_slots is 0"):
        SlotTable(0)


@pytest.fixture
def host():
    device = open_host_device(4096, 3)
    yield device
    device.close()


def test_host_slots_are_aligned_and_filled_by_readers(host: HostDevice):
    def fill(out):
        assert threading.current_thread().name.startswith("experts")
        out[:] = 7

    host.start(1, fill).wait()
    assert host.view(1).ctypes.data % 4096 == 0
    assert (host.view(1) == 7).all()
    assert (host.view(0) == 0).all()


def test_a_host_reader_that_fails_tells_who_waits(host):
    def fill(out):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        host.start(0, fill).wait()


def test_cancelling_ends_with_nobody_writing(host):
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slow(out):
        begun.set()
        assert go_on.wait(10)
        done.append("slow")

    first = [host.start(slot, slow) for slot in (0, 1)]  # both readers are busy
    queued = host.start(2, lambda out: done.append("never"))
    assert begun.wait(10)
    queued.cancel()
    threading.Timer(0.05, go_on.set).start()
    for arrival in first:
        arrival.cancel()
    assert done == ["slow", "slow"]


def test_memory_that_is_not_to_be_had_is_told():
    with pytest.raises(MemoryError, match="bytes for 1000000 expert slots are not to be had"):
        open_host_device(2**40, 10**6)


LAYERS = ["encoder-0", "encoder-1", "decoder-0", "decoder-1"]


def test_decoder_layers_are_pinned_first_and_evenly():
    plan = plan_experts(10 * 100, 100, LAYERS, 4)
    assert (plan.num_slots, plan.num_streaming, plan.arena_bytes) == (10, 2, 1000)
    assert plan.pinned == tuple(
        Key(f"decoder-{layer}", expert) for expert in range(4) for layer in range(2)
    )
    more = plan_experts(12 * 100, 100, LAYERS, 4)
    assert more.pinned[8:] == (Key("encoder-0", 0), Key("encoder-1", 0))


def test_all_experts_are_pinned_if_they_fit():
    plan = plan_experts(10**9, 100, LAYERS, 4)
    assert (plan.num_slots, len(plan.pinned), plan.num_streaming) == (16, 16, 0)


def test_the_smallest_budget_streams_everything():
    plan = plan_experts(299, 100, LAYERS, 4)
    assert (plan.num_slots, plan.pinned) == (2, ())


def test_a_budget_that_is_too_small_does_the_sum():
    with pytest.raises(BudgetTooSmall, match="199 bytes hold 1 experts of 100 bytes; .* 200 bytes"):
        plan_experts(199, 100, LAYERS, 4)

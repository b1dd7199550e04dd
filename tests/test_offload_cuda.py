import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import load_model, save_model
from engine.checkpoint_experts import expert_layout
from engine.experts import open_offloaded
from offload.cuda import NUM_STAGING, CudaDevice, missing_for_cuda, open_cuda_device
from offload.device import map_rows
from offload.errors import ReadCancelled
from offload.slots import Key
from tests import offload_cases as cases
from tests.fake_cuda import POISON, FakeDriver
from tests.tiny import MOE, random_ids, tiny_model

SLOT_BYTES = 64
KEY = Key("decoder-0", 0)


class FakeRig:
    """A CudaDevice over the fake driver; its computations are the driver's."""

    slot_bytes = SLOT_BYTES

    def __init__(self, num_slots, num_readers=2, **driver):
        self.driver = FakeDriver(**driver)
        self.device = open_cuda_device(SLOT_BYTES, num_slots, num_readers, self.driver)

    def check(self, blob, key):
        self.driver.launch(blob.data_ptr(), cases.content(key, SLOT_BYTES).tobytes(), str(key))

    def read(self, key, out, is_cancelled=lambda: False):
        self.driver.host_writes(out.ctypes.data, out.nbytes)
        out[:] = POISON
        out[:] = cases.content(key, SLOT_BYTES)

    def reader(self, key):
        return lambda out, is_cancelled: self.read(key, out, is_cancelled)

    def use(self, slot, key):
        """Compute on a slot and let it go."""
        self.check(self.device.view(slot), key)
        self.device.release(slot)

    def adopted(self, num_rows):
        rows = map_rows(num_rows, SLOT_BYTES)
        for expert, row in enumerate(rows):
            row[:] = cases.content(Key("decoder-0", expert), SLOT_BYTES)
        self.device.adopt(rows)
        return rows

    def count(self, kind):
        return sum(entry[0] == kind for entry in self.driver.log)

    def finish(self):
        self.device.close()
        self.driver.verify()
        assert self.driver.registered == {}


WHIMS = {"haste": st.sampled_from([0.0, 0.5, 0.9]), "seed": st.integers(0, 10**6)}


@settings(max_examples=120, deadline=None)
@given(
    steps=cases.STEPS,
    budget=st.integers(2, 34),
    num_host=st.integers(0, 20),
    is_pinned=st.booleans(),
    **WHIMS,
)
def test_every_wanted_expert_is_lent_and_never_overwritten(
    steps, budget, num_host, is_pinned, haste, seed
):
    rig = FakeRig(budget, haste=haste, seed=seed, refuse=lambda size: not is_pinned)
    cases.lends_every_wanted_expert(rig, steps, budget, num_host)


@pytest.mark.parametrize("num_lent", [0, 1, 2, 3])
@pytest.mark.parametrize("haste", [0.0, 0.9])
def test_a_loop_left_early_leaves_nothing_held(num_lent, haste):
    cases.a_loop_left_early_leaves_nothing_held(FakeRig(3, haste=haste), num_lent)


@pytest.mark.parametrize("broken", [0, 2, 4])
@pytest.mark.parametrize("haste", [0.0, 0.9])
def test_a_read_that_fails_is_raised_and_the_next_step_is_served(broken, haste):
    cases.a_read_that_fails_is_raised_and_the_next_step_is_served(FakeRig(3, haste=haste), broken)


@pytest.mark.parametrize("haste", [0.0, 0.9])
def test_an_error_in_the_loop_body_leaves_nothing_held(haste):
    cases.an_error_in_the_loop_body_leaves_nothing_held(FakeRig(2, haste=haste))


@pytest.mark.parametrize("num_host", [0, 32])
@pytest.mark.parametrize("haste", [0.0, 0.9])
def test_a_wrong_guess_is_given_up_and_never_taken_for_an_expert(num_host, haste):
    rig = FakeRig(3, haste=haste)
    cases.a_wrong_guess_is_given_up_and_never_taken_for_an_expert(rig, num_host)


def test_a_copy_from_adopted_memory_is_ready_for_the_host_and_goes_the_short_way():
    rig = FakeRig(2)
    rows = rig.adopted(3)
    arrival = rig.device.copy(1, rows[2])
    assert arrival.is_ready()
    assert not arrival.has_failed()
    assert (rig.device.view(1) == POISON).all()  # nothing has run yet: the host did not wait
    arrival.wait()
    arrival.join()
    arrival.stop()
    rig.use(1, Key("decoder-0", 2))
    assert [entry for entry in rig.driver.log if "copy" in entry[0]] == [
        ("copy", rows[2].ctypes.data)
    ]
    assert rig.count("synchronize event") == 0
    rig.finish()


def test_a_slot_that_computations_read_is_overwritten_only_after_them():
    rig = FakeRig(1)
    rows = rig.adopted(3)
    for expert in (0, 1, 2, 1):
        rig.device.copy(0, rows[expert]).wait()
        rig.use(0, Key("decoder-0", expert))
    assert (rig.device.view(0) == POISON).all()  # all four are still to be done
    rig.finish()


def test_a_copy_that_was_given_up_is_followed_by_the_next_one():
    rig = FakeRig(1)
    rows = rig.adopted(2)
    rig.device.copy(0, rows[0]).stop()
    rig.device.copy(0, rows[1]).wait()
    rig.use(0, Key("decoder-0", 1))
    rig.finish()


def test_what_torch_did_with_the_memory_before_is_over_before_the_first_copy():
    driver = FakeDriver()
    driver.launch(driver.allocate(1, 8).data_ptr(), bytes([POISON] * 8))
    slots = driver.allocate(1, SLOT_BYTES)
    driver.launch(slots.data_ptr(), bytes([POISON] * SLOT_BYTES))
    device = CudaDevice(slots, map_rows(NUM_STAGING, SLOT_BYTES), driver)
    device.read(0, lambda out, _: out.fill(1)).wait()
    device.close()
    driver.verify()


def test_exactly_the_adopted_bytes_are_registered():
    rig = FakeRig(1)
    rows = map_rows(5, SLOT_BYTES)
    rig.device.adopt(rows[:2])
    rig.device.adopt(rows[3:])
    assert rig.driver.registered[rows.ctypes.data] == 2 * SLOT_BYTES
    assert rig.driver.registered[rows[3].ctypes.data] == 2 * SLOT_BYTES
    for row, kind in zip(rows, [True, True, False, True, True], strict=True):
        row[:] = cases.content(KEY, SLOT_BYTES)
        before = len(rig.driver.log)
        rig.device.copy(0, row).wait()
        source = next(where for what, where in rig.driver.log[before:] if what == "copy")
        assert (source == row.ctypes.data) == kind
        rig.use(0, KEY)
    rig.finish()


def test_memory_that_cannot_be_pinned_is_copied_by_readers_and_the_fallback_is_shown(caplog):
    rig = FakeRig(2, refuse=lambda size: size > NUM_STAGING * SLOT_BYTES)
    with caplog.at_level(logging.WARNING):
        rows = rig.adopted(4)
        rig.adopted(4)
    assert len(caplog.records) == 1
    assert rig.device.fallbacks() == (
        "512 bytes of host memory cannot be pinned, and experts there are copied twice: "
        "cudaErrorMemoryAllocation: out of memory",
    )
    for expert in range(4):
        rig.device.copy(expert % 2, rows[expert]).wait()
        rig.use(expert % 2, Key("decoder-0", expert))
    assert (rig.count("copy"), rig.count("pageable copy")) == (4, 0)
    rig.finish()


def test_staging_buffers_that_cannot_be_pinned_serve_all_the_same():
    rig = FakeRig(2, refuse=lambda size: True)
    assert "staging buffers cannot be pinned, and reads from disk" in rig.device.fallbacks()[0]
    rig.device.read(1, rig.reader(KEY)).wait()
    rig.use(1, KEY)
    assert (rig.count("copy"), rig.count("pageable copy")) == (0, 1)
    rig.finish()


def test_slots_that_do_not_fit_the_gpu_are_refused_with_the_sum():
    driver = FakeDriver(total=1000)
    message = "1,024 bytes for 16 experts do not fit the GPU, of which 1,000 of 2,000 bytes are"
    with pytest.raises(MemoryError, match=message):
        open_cuda_device(SLOT_BYTES, 16, driver=driver)
    assert driver.registered == {}


def test_staging_buffers_are_used_again_once_their_copies_are_done():
    rig = FakeRig(8, num_readers=1)
    arrivals = [rig.device.read(e, rig.reader(Key("decoder-0", e))) for e in range(8)]
    for expert, arrival in enumerate(arrivals):
        arrival.wait()
        rig.use(expert, Key("decoder-0", expert))
    sources = {where for what, where in rig.driver.log if what == "copy"}
    assert len(sources) == NUM_STAGING
    assert rig.count("synchronize event") == 8 - NUM_STAGING
    rig.finish()


def test_a_read_waits_for_its_reader_and_raises_what_it_raised():
    rig = FakeRig(2)

    def broken(out, is_cancelled):
        raise OSError(5, "Input/output error")

    arrival = rig.device.read(0, broken)
    arrival.join()
    assert arrival.is_ready()
    assert arrival.has_failed()
    with pytest.raises(OSError, match="Input/output"):
        arrival.wait()
    good = rig.device.read(0, rig.reader(KEY))
    good.wait()
    assert not good.has_failed()
    rig.use(0, KEY)
    rig.finish()


def test_stopping_a_read_does_not_block_and_leaves_the_slot_and_the_buffers_usable():
    rig = FakeRig(3)
    begun, go_on, done = threading.Barrier(3), threading.Event(), []

    def slow(out, is_cancelled):
        begun.wait(300)
        assert go_on.wait(300)
        done.append(is_cancelled())
        if is_cancelled():
            raise ReadCancelled
        rig.read(KEY, out)

    running = [rig.device.read(slot, slow) for slot in (0, 1)]  # both readers are busy
    queued = rig.device.read(2, lambda out, is_cancelled: done.append("never"))
    begun.wait(300)
    queued.stop()
    queued.join()
    running[0].stop()
    assert queued.has_failed()
    assert not running[0].is_ready()
    go_on.set()
    running[0].join()
    running[1].wait()
    assert running[0].has_failed()
    rig.use(1, KEY)
    for expert in range(2 * NUM_STAGING):
        rig.device.read(0, rig.reader(Key("decoder-0", expert))).wait()
        rig.use(0, Key("decoder-0", expert))
    assert sorted(done) == [False, True]
    rig.finish()


def test_an_error_of_cuda_is_told_to_whoever_waits():
    class Broken(FakeDriver):
        def copy(self, target, source, size, stream):
            raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access")

    rig = FakeRig(1)
    rows = rig.adopted(1)
    driver = Broken()
    device = open_cuda_device(SLOT_BYTES, 1, driver=driver)
    device.adopt(rows)
    for arrival in (device.copy(0, rows[0]), device.read(0, rig.reader(KEY))):
        arrival.join()
        assert arrival.has_failed()
        with pytest.raises(RuntimeError, match="IllegalAddress"):
            arrival.wait()
    device.close()
    rig.finish()


def test_closing_ends_readers_and_copies_but_waits_for_no_computation():
    rig = FakeRig(4)
    rows = rig.adopted(2)
    last = rig.device.copy(0, rows[0])
    last.wait()
    rig.use(0, Key("decoder-0", 0))
    rig.device.copy(1, rows[1])
    reads = [rig.device.read(slot, rig.reader(KEY)) for slot in (2, 3)]
    rig.device.close()
    assert all(read.is_ready() for read in reads)
    assert (rig.device.view(1).numpy() == rows[1]).all()
    assert rig.count("synchronize stream") == 1
    assert rig.driver.pending(rig.driver.stream) > 0
    rig.driver.verify()
    rig.device.close()  # twice does no harm
    assert rig.driver.registered == {}


def test_readers_work_on_the_gpu_of_the_device():
    rig = FakeRig(2)
    for slot in range(2):
        rig.device.read(slot, rig.reader(KEY)).wait()
    readers = {name for name in rig.driver.entered if name.startswith("experts")}
    assert readers
    assert readers <= {"experts_0", "experts_1"}
    rig.finish()


def test_computing_on_another_stream_than_the_events_are_for_is_our_mistake():
    rig = FakeRig(1)
    rig.driver.stream = rig.driver.new_stream()
    with pytest.raises(AssertionError, match="current stream changed"):
        rig.device.view(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_keeps_a_machine_from_using_cuda_is_told():
    assert "torch finds no NVIDIA GPU" in missing_for_cuda()


def disordered(act):
    """The violations that the fake driver finds in what is done with a bare stream of copies."""
    driver = FakeDriver()
    slot, stream = driver.allocate(1, 8).data_ptr(), driver.new_stream()
    source = np.zeros(8, np.uint8)
    driver.register(source.ctypes.data, 8)
    act(driver, slot, source.ctypes.data, stream, driver.new_event())
    with pytest.raises(AssertionError):
        driver.verify()
    return driver.violations


def test_the_fake_driver_finds_a_read_before_its_copy():
    def act(driver, slot, source, stream, event):
        driver.copy(slot, source, 8, stream)
        driver.record(event, stream)
        driver.launch(slot, bytes(8))  # without waiting for the event

    assert "nothing orders writes and reads of a slot" in disordered(act)


def test_the_fake_driver_finds_a_copy_over_a_slot_in_use():
    def act(driver, slot, source, stream, event):
        driver.launch(slot, bytes([POISON] * 8))
        driver.copy(slot, source, 8, stream)

    assert "nothing orders reads and writes of a slot" in disordered(act)


def test_the_fake_driver_finds_a_buffer_that_changes_under_a_copy():
    def act(driver, slot, source, stream, event):
        driver.copy(slot, source, 8, stream)
        driver.host_writes(source, 8)

    assert disordered(act) == ["a buffer is overwritten while it may still be copied from"]


def test_the_fake_driver_finds_memory_unregistered_under_a_copy():
    def act(driver, slot, source, stream, event):
        driver.copy(slot, source, 8, stream)
        driver.unregister(source)

    assert disordered(act) == ["memory is unregistered while it may still be copied from"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_over_three_tiers_equals_the_resident_one_bit_for_bit(tmp_path, dtype):
    save_model(tiny_model(MOE, seed=2), tmp_path / "model", dtype=dtype)
    resident = load_model(tmp_path / "model")
    slot_bytes = expert_layout(MOE, dtype).blob_bytes
    driver = FakeDriver(eager=True)  # torch computes on the CPU, so what it reads must be there
    with open_offloaded(
        tmp_path / "model",
        MOE,
        dtype,
        5 * slot_bytes,
        host_bytes=4 * slot_bytes,
        make_device=lambda size, count: open_cuda_device(size, count, driver=driver),
    ) as experts:
        model = load_model(tmp_path / "model", experts=experts)
        source, target = random_ids(2, 9), random_ids(2, 5, seed=1)
        ones = torch.ones_like
        with torch.inference_mode():
            expected = resident(source, ones(source), target, ones(target))
            for _ in range(2):
                assert torch.equal(model(source, ones(source), target, ones(target)), expected)
        stats = experts.stats
        assert min(stats.hits, stats.host_loads, stats.read_bytes, experts.plan.num_disk) > 0
    driver.verify()

"""CudaDevice on a real GPU: the cases of the fake driver again, and what only hardware can show."""

import json
import logging
from time import perf_counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import load_model, save_model
from engine.checkpoint_experts import expert_layout
from engine.experts import load_offloaded
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from offload.cuda import missing_for_cuda, open_cuda_device
from offload.device import map_rows
from offload.slots import Key
from server.__main__ import main
from tests import offload_cases as cases
from tests.tiny import MOE, byte_tokenizer, random_ids, tiny_model

if (reason := missing_for_cuda()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.gpu

SLOT_BYTES = 2**20
LATE_CYCLES = 200_000  # about 0.1 ms, in which a GPU copies several slots
CONTENT = {key: cases.content(key, SLOT_BYTES) for key in cases.ALL_KEYS}
REPEATS = 5


class GpuRig:
    """Slots that are poisoned before use, and computations that are late."""

    slot_bytes = SLOT_BYTES

    def __init__(self, num_slots):
        self.device = open_cuda_device(SLOT_BYTES, num_slots)
        self.expected = {key: torch.from_numpy(array).cuda() for key, array in CONTENT.items()}
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for slot in range(num_slots):
            self.device.view(slot).fill_(cases.POISON)
            self.device.release(slot)

    def check(self, blob, key):
        for _ in range(2):
            self.wrong += (blob != self.expected[key]).sum()
            torch.cuda._sleep(LATE_CYCLES)

    def read(self, key, out, is_cancelled=lambda: False):
        out[:] = cases.POISON
        out[:] = CONTENT[key]

    def finish(self):
        self.device.close()
        assert self.wrong.item() == 0


def adopted_rows(rig, keys):
    rows = map_rows(len(keys), SLOT_BYTES)
    for row, key in zip(rows, keys, strict=True):
        row[:] = CONTENT[key]
    rig.device.adopt(rows)
    return rows


@settings(max_examples=25, deadline=None)
@given(steps=cases.STEPS, budget=st.integers(2, 34), num_host=st.integers(0, 20))
def test_every_wanted_expert_is_lent_and_never_overwritten(steps, budget, num_host):
    cases.lends_every_wanted_expert(GpuRig(budget), steps, budget, num_host)


@pytest.mark.parametrize("num_lent", [0, 1, 2, 3])
def test_a_loop_left_early_leaves_nothing_held(num_lent):
    cases.a_loop_left_early_leaves_nothing_held(GpuRig(3), num_lent)


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_a_read_that_fails_is_raised_and_the_next_step_is_served(broken):
    cases.a_read_that_fails_is_raised_and_the_next_step_is_served(GpuRig(3), broken)


def test_an_error_in_the_loop_body_leaves_nothing_held():
    cases.an_error_in_the_loop_body_leaves_nothing_held(GpuRig(2))


@pytest.mark.parametrize("num_host", [0, 32])
def test_a_wrong_guess_is_given_up_and_never_taken_for_an_expert(num_host):
    cases.a_wrong_guess_is_given_up_and_never_taken_for_an_expert(GpuRig(3), num_host)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # told when it is switched on
def test_the_host_does_not_wait_where_all_misses_are_in_host_memory():
    rig = GpuRig(3)
    pipeline = cases.open_pipeline(rig, cases.make_plan(SLOT_BYTES, 3, 32))
    cases.borrow(rig, pipeline, "decoder-0", range(8))  # kernels are loaded when first used
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    ended = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in ("decoder-1", "decoder-0"):
            cases.borrow(rig, pipeline, layer, range(8))
        ended.record()
        assert not ended.query()  # all has been given out before the first of it is computed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rig.finish()


def test_a_copy_hides_behind_computing():
    slot_bytes = 2**28
    device = open_cuda_device(slot_bytes, 2)
    rows = map_rows(1, slot_bytes)
    rows.fill(1)
    device.adopt(rows)
    device.copy(0, rows[0]).wait()
    matrix = device.view(0)[: 2 * 4096**2].view(torch.bfloat16).view(4096, 4096)

    def timed(num_products, *, copies):
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            arrival = device.copy(1, rows[0]) if copies else None
            for _ in range(num_products):
                torch.mm(matrix, matrix)
            if arrival is not None:
                arrival.wait()
            device.release(1)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[REPEATS // 2]

    timed(10, copies=True)
    copy_ms = timed(0, copies=True)
    num_products = max(round(copy_ms / (timed(50, copies=False) / 50)), 1)
    compute_ms = timed(num_products, copies=False)
    both_ms = timed(num_products, copies=True)
    device.close()
    shown = f"copy {copy_ms:.2f} ms, computing {compute_ms:.2f} ms, both {both_ms:.2f} ms"
    assert both_ms < 0.85 * (copy_ms + compute_ms), shown


def test_a_copy_from_adopted_memory_reaches_the_speed_of_pinned_memory():
    slot_bytes = 2**28
    device = open_cuda_device(slot_bytes, 1)
    rows = map_rows(1, slot_bytes)
    rows.fill(1)
    device.adopt(rows)
    pinned = torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(slot_bytes, dtype=torch.uint8, device="cuda")

    def best(work):
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            began = perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        return min(times)

    theirs = best(lambda: target.copy_(pinned, non_blocking=True))
    ours = best(lambda: device.copy(0, rows[0]).wait())
    device.close()
    assert ours < theirs / 0.9


def test_exactly_the_adopted_bytes_are_pinned():
    runtime = pytest.importorskip("cupy").cuda.runtime
    rig = GpuRig(1)
    rows = map_rows(4, SLOT_BYTES)
    rows.fill(0)
    begin = rows.ctypes.data

    def is_pinned(offset):
        return runtime.pointerGetAttributes(begin + offset).type == runtime.memoryTypeHost

    rig.device.adopt(rows[1:3])
    ends = [SLOT_BYTES - 1, SLOT_BYTES, 3 * SLOT_BYTES - 1, 3 * SLOT_BYTES]
    assert [is_pinned(offset) for offset in ends] == [False, True, True, False]
    rig.finish()
    assert not any(is_pinned(offset) for offset in ends)


def test_a_refused_registration_leaves_no_error_behind_and_is_shown(caplog):
    rig = GpuRig(2)
    keys = [Key("decoder-0", expert) for expert in range(3)]
    rows = adopted_rows(rig, keys)[:1]
    rest = map_rows(2, SLOT_BYTES)
    for row, key in zip(rest, keys[1:], strict=True):
        row[:] = CONTENT[key]
    rig.device.adopt(rest[:1])
    with caplog.at_level(logging.WARNING):
        rig.device.adopt(rest)  # a part of it is registered already
    assert "cudaErrorHostMemoryAlreadyRegistered" in rig.device.fallbacks()[0]
    assert len(caplog.records) == 1
    assert (torch.ones(3, device="cuda") * 2).sum().item() == 6
    for source, key in zip((rows[0], *rest), keys, strict=True):
        rig.device.copy(1, source).wait()
        rig.check(rig.device.view(1), key)
        rig.device.release(1)
    rig.finish()


def test_slots_that_do_not_fit_are_refused_with_the_sum_and_the_gpu_goes_on():
    with pytest.raises(MemoryError, match="10,737,418,240,000 bytes for 10000 experts do not fit"):
        open_cuda_device(2**30, 10_000)
    rig = GpuRig(1)
    rig.device.read(0, lambda out, _: rig.read(cases.ALL_KEYS[0], out)).wait()
    rig.check(rig.device.view(0), cases.ALL_KEYS[0])
    rig.finish()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request, tmp_path):
    """A resident model on the GPU, and the same over three tiers."""
    save_model(tiny_model(MOE, seed=2), tmp_path / "model", dtype=request.param)
    slot_bytes = expert_layout(MOE, request.param).blob_bytes
    resident = load_model(tmp_path / "model").to("cuda")
    model, experts = load_offloaded(
        tmp_path / "model", None, 5 * slot_bytes, host_bytes=4 * slot_bytes, device="cuda"
    )
    with experts:
        yield resident, model, experts


def test_offloaded_equals_resident_bit_for_bit(models):
    resident, model, experts = models
    ones = torch.ones_like
    with torch.inference_mode():
        for seed in range(5):
            source = random_ids(3, 9, seed).to("cuda")
            target = random_ids(3, 5, seed + 100).to("cuda")
            expected = resident(source, ones(source), target, ones(target))
            assert torch.equal(model(source, ones(source), target, ones(target)), expected)
    stats = experts.stats
    assert min(stats.hits, stats.host_loads, stats.read_bytes) > 0


def test_generation_is_the_same_offloaded_and_resident(models):
    params = SamplingParams(max_tokens=12, temperature=1.0, top_k=50, top_p=0.9, seed=1)
    request = build_request("some text", byte_tokenizer(), MOE, params, "r")
    texts = [
        [event for event in generate(model, byte_tokenizer(), request) if isinstance(event, Piece)]
        for model in models[:2]
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("experts", ["bf16", "int8", "int4"])
def test_the_bench_runs_on_the_gpu(experts, capsys):
    small = ["--tokens", "4", "--batch", "3", "--source-tokens", "16", "--gpu-memory", "2GiB"]
    with pytest.raises(SystemExit) as ended:
        main(["bench-gpu", "--preset", "tiny", "--experts", experts, *small])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["fallbacks"] == []
    assert report["decode_3"]["tokens_per_s"]["min"] > 0

"""Plans of the whole memory: formulas against sums done by hand, refusals, properties."""

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.checkpoint_experts import expert_layout
from engine.config import PRESETS
from engine.errors import ConfigError
from engine.footprint import (
    PREFIX_TOKENS,
    Workload,
    cache_bytes,
    dense_bytes,
    largest_workload,
    packing_bytes,
    workspace_bytes,
)
from engine.model.transformer import Transformer
from engine.planning import (
    GPU_CONTEXT_BYTES,
    Budgets,
    Storage,
    choose_rows,
    fixed_lines,
    plan_from_json,
    plan_memory,
)
from engine.request import SamplingParams
from engine.sampling import choose_token
from offload.cuda import NUM_STAGING
from tests.tiny import DENSE, MOE, random_ids, tiny_model

CPM2 = PRESETS["cpm2-moe-198b"]
MIB, GIB = 2**20, 2**30
PROCESS = 300 * MIB
SHORT = Workload(source_tokens=20, target_tokens=10)


def storage(config=MOE, dtype=torch.float32, quantization="none", **more) -> Storage:
    slot = expert_layout(config, dtype, quantization).blob_bytes if config.num_experts else 0
    return Storage(config=config, dtype=dtype, slot_bytes=slot, quantization=quantization, **more)


def plan(stored, host, gpu=None, workload=SHORT):
    return plan_memory(stored, workload, Budgets(host_bytes=host, gpu_bytes=gpu), PROCESS)


def fixed(stored, place="host", *, on_gpu=False, workload=SHORT) -> int:
    lines = fixed_lines(stored, workload, PROCESS, on_gpu=on_gpu)
    return sum(line.nbytes for line in lines if line.place == place)


# --- what the model takes ---


@pytest.mark.parametrize("config", [DENSE, MOE, replace(DENSE, tied_embeddings=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bytes_are_those_of_the_model(config, dtype):
    model = Transformer(config).to(dtype)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("experts.")}
    found = dense_bytes(config, dtype)
    assert found.total == sum(tensor.nbytes for tensor in state.values())
    inner, buckets = 4 * 8, 32 * 4
    projections = 2 * 32 * 2 * inner  # two layers' keys and values of the encoder output
    feed_forward = 32 + 3 * 32 * 48 if not config.num_experts else 4 * 32 + 32  # or the router
    encoder = 2 * (32 + 4 * 32 * inner + feed_forward) + 32 + buckets
    decoder = 2 * (2 * 32 + 6 * 32 * inner + feed_forward) + 32 + buckets
    assert found.sweep == (encoder + projections) * dtype.itemsize
    assert found.step == (decoder + 384 * 32) * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", [SHORT, Workload(rows=3, source_tokens=5, target_tokens=7)])
def test_cache_bytes_are_those_of_a_cache(dtype, load):
    model = tiny_model(MOE).to(dtype)
    ids = random_ids(load.rows, load.source_tokens)
    with torch.inference_mode():
        hidden = model.encode(ids, torch.ones_like(ids))
        cache = model.start_cache(hidden, torch.ones_like(ids), load.target_tokens)
    lists = (cache.self_keys, cache.self_values, cache.cross_keys, cache.cross_values)
    tensors = [*(t for part in lists for t in part), cache.cross_bias, cache.lengths_B]
    assert cache_bytes(MOE, dtype, load) == sum(tensor.nbytes for tensor in tensors)


def test_the_cache_of_cpm2_by_hand():
    load = Workload(source_tokens=512, target_tokens=512)
    assert cache_bytes(CPM2, torch.bfloat16, load) == 384 * MIB + 512 * 2 + 8


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they are held."""

    def __init__(self, model):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, memory):
        place, size = memory.data_ptr(), memory.nbytes()
        if size and place not in self.seen:
            self.seen.add(place)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(memory, self.forget, place, size)

    def forget(self, place, size):
        self.seen.discard(place)
        self.live -= size


@torch.inference_mode()
def peak_bytes(config, dtype, load) -> int:
    """The most that tensors take beside the weights while a batch is encoded and decoded."""
    model = tiny_model(config).to(dtype)
    params = SamplingParams(temperature=1, top_p=0.9, top_k=5)
    with PeakBytes(model) as counter:
        ids = random_ids(load.rows, load.source_tokens)
        hidden = model.encode(ids, torch.ones_like(ids))
        cache = model.start_cache(hidden, torch.ones_like(ids), load.target_tokens)
        for length in (PREFIX_TOKENS, *[1] * (load.target_tokens - PREFIX_TOKENS)):
            tokens = torch.zeros(load.rows, length, dtype=torch.int64)
            logits = model.logits(model.step(tokens, cache)[:, -1])
            for row in logits:
                choose_token(row.clone(), params, torch.Generator())
    return counter.peak


@settings(max_examples=15)
@given(
    config=st.builds(
        replace,
        st.sampled_from([DENSE, MOE]),
        d_model=st.sampled_from([16, 64]),
        d_ff=st.sampled_from([16, 160]),
        num_heads=st.sampled_from([1, 6]),
        num_decoder_layers=st.sampled_from([1, 5]),
        vocab_size=st.sampled_from([300, 5000]),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    load=st.builds(
        Workload,
        rows=st.integers(1, 3),
        source_tokens=st.sampled_from([1, 7, 120]),
        target_tokens=st.sampled_from([2, 9, 60]),
    ),
)
def test_nothing_takes_more_than_caches_and_workspace(config, dtype, load):
    planned = cache_bytes(config, dtype, load)
    planned += workspace_bytes(config, dtype, load, quantized_on_gpu=None)
    assert peak_bytes(config, dtype, load) <= planned


def test_dequantised_matrices_are_workspace():
    sizes = [
        workspace_bytes(MOE, torch.bfloat16, SHORT, quantized_on_gpu=on_gpu)
        for on_gpu in (None, False, True)
    ]
    per_element = 2 + 2 * 4 + 2
    assert sizes[1] - sizes[0] == 256 * 48 * per_element
    assert sizes[2] - sizes[0] == 32 * 48 * per_element


@pytest.mark.parametrize("name", ["rows", "source_tokens", "target_tokens"])
def test_a_workload_is_more_than_nothing(name):
    values = {"rows": 1, "source_tokens": 1, "target_tokens": 1, name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Workload(**values)


def test_the_largest_workload_is_the_longest_request_that_is_accepted():
    assert largest_workload(CPM2, 3) == Workload(rows=3, source_tokens=2048, target_tokens=2050)


# --- plans ---


def test_all_is_resident_if_it_fits():
    stored = storage()
    needed = fixed(stored) + 16 * stored.slot_bytes
    made = plan(stored, needed)
    assert made.is_resident
    assert not made.is_offloaded
    assert made.total("host") == needed
    assert made.parts()["expert slots"] == 16 * 20_480
    assert made.parts()["only on disk"] == 0
    assert "all 16 experts are resident" in made.summary()[0]
    assert not plan(stored, needed - 1).is_resident


def test_quantised_experts_are_always_read_into_slots():
    stored = storage(MOE, torch.bfloat16, "int8")
    assert plan(stored, GIB).is_offloaded
    assert plan(stored, GIB).is_resident


def test_the_lines_of_a_plan_by_hand():
    stored = storage()
    load = Workload(rows=2, source_tokens=3, target_tokens=5)
    made = plan(stored, fixed(stored, workload=load) + 8 * 20_480 + 999, workload=load)
    parts = made.parts()
    assert parts["process"] == PROCESS
    filling = packing_bytes(MOE, torch.float32).filling
    assert parts["dense weights"] == dense_bytes(MOE, torch.float32).total + filling
    assert parts["decoder caches"] == 2 * (2 * 2 * 4 * 8 * (3 + 5) * 4 + 3 * 4 + 8)
    assert parts["expert slots"] == 8 * 20_480
    assert parts["only on disk"] == 12 * 20_480  # 4 are pinned, 4 slots go round
    assert made.total("host") == made.budgets.host_bytes - 999
    assert made.residence() == {
        "pinned": {"decoder": 4},
        "decode": {"decoder": 2},
        "sweep": {"encoder": 2},
        "host": {},
        "disk": {"decoder": 4, "encoder": 8},
    }
    assert made.summary()[0].endswith(
        "; 8 slots for 16 experts: 4 pinned, 2 for decoding, 2 for the encoder; "
        "0 wait in host memory, 12 on disk"
    )


def test_rows_that_decode_together_get_slots_to_pass_through():
    """24 decoder layers of 32 experts and 206 slots, of which 8 are for the sweep and 198 left.

    A row wants 24 experts of 768 and moves 24 * (1 - 198 / 768) = 17.8; with a fifth, 21.4. Two
    rows want 47.25 different ones: 42.1.
    """
    stored = storage(CPM2, torch.bfloat16, "int4")
    found = []
    for rows in (1, 2):
        load = replace(SHORT, rows=rows)
        host = fixed(stored, workload=load) + 206 * stored.slot_bytes
        experts = plan(stored, host, workload=load).experts
        found.append((len(experts.pinned), experts.num_decode, experts.num_sweep))
    assert found == [(176, 22, 8), (155, 43, 8)]


def test_a_gpu_has_its_own_budget_and_the_host_keeps_what_waits():
    stored = storage()
    gpu = fixed(stored, "gpu", on_gpu=True) + 8 * 20_480
    host = fixed(stored, on_gpu=True) + 6 * 20_480 + 1
    made = plan(stored, host, gpu)
    parts = made.parts()
    assert made.total("gpu") == gpu
    assert made.total("host") == host - 1
    assert parts["GPU context"] == GPU_CONTEXT_BYTES
    assert parts["staging"] == NUM_STAGING * 20_480
    assert parts["loading"] == parts["dense weights"]
    assert parts["waiting experts"] == 6 * 20_480
    assert made.residence()["host"] == {"decoder": 4, "encoder": 2}
    assert made.is_offloaded
    assert [line.split(":")[0] for line in made.summary()] == ["memory", "GPU memory"]


def test_a_dense_model_on_a_gpu_passes_through_host_memory():
    stored = storage(DENSE)
    made = plan(stored, GIB, 2 * GIB)
    assert made.experts is None
    assert made.is_resident
    assert not made.is_offloaded
    assert made.parts()["loading"] == dense_bytes(DENSE, torch.float32).total
    assert "the model is dense" in made.summary()[0]
    assert made.residence() == {}
    moe = storage(only_resident="convert it")
    assert not plan(moe, GIB, 2 * GIB).is_offloaded
    assert plan(moe, GIB, 2 * GIB).parts()["loading"] == (
        dense_bytes(MOE, torch.float32).total + 16 * 20_480
    )


def refusal(stored, host, gpu=None) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(stored, host, gpu)
    return str(caught.value)


def test_a_refusal_does_the_sum():
    stored = storage()
    text = refusal(stored, 1000)
    assert text.startswith("memory of 1,000 bytes (1000 B) is too small; needed at least, 2 expert")
    terms = re.search(r": (process .*) = ([\d,]+) bytes", text)
    numbers = [int(number.replace(",", "")) for number in re.findall(r" ([\d,]+)", terms[1])]
    assert sum(numbers) == int(terms[2].replace(",", "")) == fixed(stored) + 2 * 20_480
    assert re.findall(r"[a-z ]+(?= [\d,]+(?: \+|$))", terms[1]) == [
        "process",
        " dense weights",
        " decoder caches",
        " workspace",
        " expert slots",
    ]
    assert "in bf16 (--dtype) the model takes half" in text
    assert "`infmoe convert --experts int4` makes experts smaller" in text
    assert refusal(stored, 10**12, 1000).startswith("GPU memory of 1,000 bytes")
    assert refusal(stored, 1000, 10**12).startswith("memory of 1,000 bytes")


def test_a_model_that_cannot_be_offloaded_needs_all():
    text = refusal(storage(only_resident="run `infmoe convert`"), 1000)
    assert ", 16 expert slots among it" in text
    assert text.endswith(" bytes or more, or run `infmoe convert`")


def test_a_dense_model_only_has_the_sum():
    text = refusal(storage(DENSE, torch.bfloat16), 1000)
    assert "needed at least: process" in text
    assert "expert" not in text


STORED = st.sampled_from(
    [
        storage(),
        storage(DENSE),
        storage(MOE, torch.bfloat16, "int8"),
        storage(only_resident="convert it"),
        storage(replace(MOE, num_experts=6, num_encoder_layers=1, num_decoder_layers=5)),
    ]
)
ROOM = st.integers(0, 60 * 20_480)
MAYBE_ROOM = st.none() | ROOM


def budgets_with(stored, room, gpu_room):
    """Budgets with so much left beside the fixed parts."""
    on_gpu = gpu_room is not None
    gpu = fixed(stored, "gpu", on_gpu=True) + gpu_room if on_gpu else None
    return fixed(stored, on_gpu=on_gpu) + room, gpu


@given(stored=STORED, room=ROOM, gpu_room=MAYBE_ROOM)
def test_a_plan_never_exceeds_a_budget_and_a_refusal_names_the_least_that_does(
    stored, room, gpu_room
):
    host, gpu = budgets_with(stored, room, gpu_room)
    try:
        made = plan(stored, host, gpu)
    except ConfigError as error:
        least = int(re.search(r"give (\d+) bytes or more", str(error))[1])
        if str(error).startswith("GPU"):
            assert gpu < least
            plan(stored, host, least)
            refusal(stored, host, least - 1)
        else:
            assert host < least
            plan(stored, least, gpu)
            refusal(stored, least - 1, gpu)
        return
    for place, budget in made.budgets.by_place().items():
        assert made.total(place) <= budget
    if made.experts is not None:
        left = {
            place: budget - made.total(place) for place, budget in made.budgets.by_place().items()
        }
        everything = made.is_resident
        assert everything or left[made.budgets.compute_place] < stored.slot_bytes


@given(stored=STORED, room=ROOM, gpu_room=MAYBE_ROOM, more=st.integers(0, 40_000))
def test_more_memory_never_pins_fewer(stored, room, gpu_room, more):
    host, gpu = budgets_with(stored, room, gpu_room)
    try:
        small = plan(stored, host, gpu)
    except ConfigError:
        return
    large = plan(stored, host + more, gpu if gpu is None else gpu + more)
    if small.experts is not None:
        assert len(large.experts.pinned) >= len(small.experts.pinned)
        assert large.experts.num_disk <= small.experts.num_disk or gpu is not None


@given(stored=STORED, room=ROOM, gpu_room=MAYBE_ROOM)
def test_the_plan_of_experts_comes_back_from_json(stored, room, gpu_room):
    host, gpu = budgets_with(stored, room, gpu_room)
    try:
        made = plan(stored, host, gpu)
    except ConfigError:
        return
    values = json.loads(json.dumps(made.to_json()))
    if made.experts is None:
        with pytest.raises(ConfigError, match="no plan of experts"):
            plan_from_json(values)
    else:
        assert plan_from_json(values) == made.experts
    assert values["planned_bytes"] == {
        place: made.total(place) for place in made.budgets.by_place()
    }
    assert sum(line["bytes"] for line in values["lines"]) == sum(made.parts().values())


@pytest.mark.parametrize(
    "damage",
    [
        {"pinned": [["decoder-0"]]},
        {"pinned": [["decoder-0", "x"]]},
        {"layers": None},
        {"num_decode": None},
        {"host": 3},
    ],
)
def test_a_damaged_plan_is_refused(damage):
    values = plan(storage(), GIB).to_json()
    values["expert_plan"] = {**values["expert_plan"], **damage}
    with pytest.raises(ConfigError, match="the plan of experts is damaged"):
        plan_from_json(values)


def test_experts_of_cpm2():
    """240, 120 and 63.8 MiB; the reference has 61.9 for int4, as it counts no zero per group."""
    slots = {q: storage(CPM2, torch.bfloat16, q).slot_bytes for q in ("none", "int8", "int4")}
    assert slots["none"] / MIB == pytest.approx(240, rel=1e-3)
    assert slots["int8"] / MIB == pytest.approx(120, rel=1e-3)
    zeros = 3 * 4096 * 10240 // 128 * 2
    assert (slots["int4"] - zeros) / MIB == pytest.approx(61.9, rel=1e-3)


# --- packed weights and adapters ---


def test_packing_is_planned_for_in_bf16_and_fp32():
    assert packing_bytes(DENSE, torch.float16) == (0, 0)
    config = replace(DENSE, d_model=100, vocab_size=1000)
    found = packing_bytes(config, torch.bfloat16)
    assert found.largest == 2 * 1024 * 128  # the output layer; 1000 and 100 filled up
    head = 2 * (1024 * 128 - 1000 * 100)
    assert found.filling > head
    tied = packing_bytes(replace(config, tied_embeddings=True), torch.bfloat16)
    assert tied.filling == found.filling - head
    even = replace(DENSE, d_model=64, d_ff=128, num_heads=8, vocab_size=384)
    assert packing_bytes(even, torch.bfloat16).filling == 0
    assert packing_bytes(config, torch.float32) == (2 * found.filling, 2 * found.largest)


def test_adapters_are_a_part_of_the_plan():
    with_adapters = replace(SHORT, adapter_bytes=12 * MIB)
    plans = [plan(storage(DENSE), GIB, workload=load) for load in (SHORT, with_adapters)]
    assert "adapters" not in plans[0].parts()
    assert plans[1].parts()["adapters"] == 12 * MIB
    assert plans[1].total("host") == plans[0].total("host") + 12 * MIB
    with pytest.raises(ConfigError, match="adapter_bytes is -1; it must be at least 0"):
        replace(SHORT, adapter_bytes=-1)


# --- rows ---


def chosen_rows(stored, host, most=32, workload=SHORT):
    def plan_rows(rows):
        return plan(stored, host, workload=replace(workload, rows=rows))

    return choose_rows(plan_rows, most)


def test_a_dense_model_takes_all_rows_that_fit():
    stored = storage(DENSE)
    least = fixed(stored, workload=replace(SHORT, rows=8))
    assert chosen_rows(stored, 100 * GIB).workload.rows == 32
    assert chosen_rows(stored, 100 * GIB, most=33).workload.rows == 33
    assert chosen_rows(stored, least).workload.rows == 8
    assert chosen_rows(stored, least - 1).workload.rows == 4
    with pytest.raises(ConfigError, match="too small"):
        chosen_rows(stored, 1000)


def test_rows_cost_a_model_that_is_offloaded_only_a_share():
    stored = storage(MOE)
    long = Workload(source_tokens=400, target_tokens=400)
    whole = fixed(stored, workload=replace(long, rows=32)) + stored.num_experts * stored.slot_bytes
    assert chosen_rows(stored, whole, workload=long).workload.rows == 32
    fewer = chosen_rows(stored, whole - 1, workload=long)
    parts = fewer.parts()
    share = (parts["decoder caches"] + parts["workspace"]) / (whole - 1)
    assert fewer.workload.rows < 32
    assert fewer.is_resident or share <= 1 / 8

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import load_model, save_model
from engine.checkpoint_experts import expert_layout
from engine.convert import convert
from engine.errors import CheckpointError, ConfigError
from engine.experts import load_offloaded, open_offloaded
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from tests.tiny import DENSE, MOE, byte_tokenizer, random_ids, tiny_model

ROOT = Path(__file__).parents[1]
CONFIG = replace(MOE, num_experts=6, num_encoder_layers=3, num_decoder_layers=2)
WIDE = replace(CONFIG, d_ff=64)  # int4 comes in groups of 32 and more
NUM_EXPERTS = 6 * 5


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def saved(tmp_path_factory, request):
    """A model directory, its resident model, and the bytes of a slot."""
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(tiny_model(CONFIG, seed=2), path, dtype=request.param)
    with open_offloaded(path, CONFIG, request.param, 10**9) as experts:
        return path, load_model(path), experts.plan.slot_bytes


def offloaded(saved, num_slots):
    path, resident, slot_bytes = saved
    dtype = resident.embedding.weight.dtype
    experts = open_offloaded(path, CONFIG, dtype, num_slots * slot_bytes)
    return load_model(path, experts=experts), experts


@settings(max_examples=25, deadline=None)
@given(
    num_slots=st.integers(2, NUM_EXPERTS + 3), seed=st.integers(0, 2**31), rows=st.integers(1, 3)
)
def test_offloaded_equals_resident_bit_for_bit(saved, num_slots, seed, rows):
    resident = saved[1]
    model, experts = offloaded(saved, num_slots)
    with experts, torch.inference_mode():
        for step in range(3):
            source, target = random_ids(rows, 9, seed + step), random_ids(rows, 5, seed - step)
            ones = torch.ones_like
            expected = resident(source, ones(source), target, ones(target))
            got = model(source, ones(source), target, ones(target))
            assert torch.equal(got, expected)
        stats = experts.stats
        assert stats.hits + stats.misses > 0
        if num_slots >= NUM_EXPERTS:
            assert stats.misses == 0


def test_generation_is_the_same_within_the_smallest_budget(saved):
    request = build_request(
        "some text",
        byte_tokenizer(),
        CONFIG,
        SamplingParams(max_tokens=12, temperature=1.0, seed=1),
        "r",
    )
    model, experts = offloaded(saved, 2)

    def text(of):
        return [e for e in generate(of, byte_tokenizer(), request) if isinstance(e, Piece)]

    with experts:
        assert text(model) == text(saved[1])
        assert experts.stats.read_bytes == experts.stats.misses * saved[2]


def test_progress_of_preloading_is_told(saved):
    path, resident, slot_bytes = saved
    told = []
    dtype = resident.embedding.weight.dtype
    with open_offloaded(path, CONFIG, dtype, 10 * slot_bytes, lambda *a: told.append(a)) as experts:
        assert told == [(i, 6) for i in range(1, 7)]
        assert len(experts.plan.pinned) == 6


def test_a_damaged_expert_fails_the_request_that_needs_it_and_no_other(tmp_path):
    path = tmp_path / "model"
    save_model(tiny_model(CONFIG, seed=2), path)
    file = path / "experts-encoder-1.safetensors"
    with open_offloaded(path, CONFIG, torch.float32, 10**9) as whole:
        slot_bytes = whole.plan.slot_bytes
    data = bytearray(file.read_bytes())
    data[-slot_bytes + 1000] ^= 4  # in the last expert, 5
    file.write_bytes(data)
    with open_offloaded(path, CONFIG, torch.float32, 2 * slot_bytes) as experts:
        for _ in range(2):  # again and again: a damaged blob is never taken for good
            with pytest.raises(CheckpointError, match=r"encoder-1.*expert 5.*damaged"):
                list(experts.stream("encoder-1", [0, 5, 2]))
        assert [e for e, _ in experts.stream("encoder-1", [0, 4, 2])]
    with pytest.raises(CheckpointError, match="expert 5: damaged"):
        open_offloaded(path, CONFIG, torch.float32, 10**9)


def test_a_file_cut_off_while_it_is_served_is_named(tmp_path):
    path = tmp_path / "model"
    save_model(tiny_model(CONFIG, seed=2), path)
    with open_offloaded(path, CONFIG, torch.float32, 50_000) as experts:
        file = path / "experts-encoder-0.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"experts-encoder-0.*expert 5.*file ends"):
            list(experts.stream("encoder-0", [5]))


def test_impossible_wishes_are_refused(saved, tmp_path):
    path, resident, slot_bytes = saved
    dtype = resident.embedding.weight.dtype
    other = torch.float16
    with pytest.raises(ConfigError, match="at least 2 are needed: give"):
        open_offloaded(path, CONFIG, dtype, slot_bytes)
    with pytest.raises(ConfigError, match="infmoe convert --dtype"):
        open_offloaded(path, CONFIG, other, 10**9)
    save_model(tiny_model(DENSE), tmp_path / "dense")
    with pytest.raises(ConfigError, match="is a dense model"):
        open_offloaded(tmp_path / "dense", DENSE, torch.float32, 10**9)


def test_memory_that_is_refused_is_told_and_nothing_stays_open(saved):
    path, resident, slot_bytes = saved

    def refuse(slot_bytes, num_slots):
        raise MemoryError(f"{slot_bytes * num_slots:,} bytes do not fit the GPU")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConfigError, match=r"model: no memory for experts: .* bytes do not fit"):
        open_offloaded(path, CONFIG, resident.embedding.weight.dtype, 10**6, make_device=refuse)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # those of others may be closed


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("num_slots", [2, 5, 17])
def test_quantised_experts_give_the_same_through_few_slots_as_through_many(
    tmp_path, quantization, num_slots
):
    save_model(tiny_model(WIDE, seed=2), tmp_path / "model", dtype=torch.bfloat16)
    convert(tmp_path / "model", tmp_path / "small", quantization=quantization)
    whole, all_experts = load_offloaded(tmp_path / "small", None, 10**9)
    slot_bytes = all_experts.plan.slot_bytes
    few, experts = load_offloaded(tmp_path / "small", None, num_slots * slot_bytes)
    ones = torch.ones_like
    with all_experts, experts, torch.inference_mode():
        assert slot_bytes < expert_layout(WIDE, torch.bfloat16, "none").blob_bytes
        for seed in range(3):
            source, target = random_ids(2, 9, seed), random_ids(2, 5, seed + 50)
            expected = whole(source, ones(source), target, ones(target))
            assert torch.equal(few(source, ones(source), target, ones(target)), expected)
        assert experts.stats.misses > 0
        assert all_experts.stats.misses == 0


def test_the_next_router_guesses_what_the_next_layer_wants(saved):
    """Guesses are what the next layer's router says to the hidden state of this one."""
    model, experts = offloaded(saved, 4)
    experts.attach(model)
    following = model.moe_layers()[1]
    x = torch.randn(5, CONFIG.d_model).to(saved[1].embedding.weight.dtype)
    with experts:
        experts.foresee("encoder-0", x)
        guess = experts._guess
        assert guess.layer == "encoder-1"
        wanted = following.assign(following.scores(x)).tolist()
        assert sorted(guess.experts) == sorted(set(wanted))
        counts = [wanted.count(expert) for expert in guess.experts]
        assert counts == sorted(counts, reverse=True)
        experts.foresee("encoder-2", x)  # the last of its stack: nobody knows the next token
        assert experts._guess is None


def test_lookahead_changes_no_result(saved):
    resident = saved[1]
    model, experts = offloaded(saved, 6)
    experts.attach(model)
    with experts, torch.inference_mode():
        for step in range(30):
            source, target = random_ids(1, 30, step), random_ids(1, 5, step + 1)
            ones = torch.ones_like
            expected = resident(source, ones(source), target, ones(target))
            assert torch.equal(model(source, ones(source), target, ones(target)), expected)
        assert experts.stats.prefetched > 0
        assert experts.stats.prefetch_used > 0


def test_two_models_read_one_store_at_once(saved):
    """Stores are opened for reading only; the next test does the same with two processes."""
    resident = saved[1]
    (one, first), (two, second) = offloaded(saved, 3), offloaded(saved, 4)
    with first, second, torch.inference_mode():
        source = random_ids(2, 9, 1)
        ones = torch.ones_like(source)
        for _ in range(2):
            expected = resident(source, ones, source, ones)
            assert torch.equal(one(source, ones, source, ones), expected)
            assert torch.equal(two(source, ones, source, ones), expected)


def test_two_processes_read_one_store_at_once(saved):
    path, resident, slot_bytes = saved
    code = """
        import sys, torch
        from pathlib import Path
        from engine.experts import load_offloaded
        model, experts = load_offloaded(Path(sys.argv[1]), None, int(sys.argv[2]))
        print("open", flush=True)
        sys.stdin.readline()  # until the other process has them open as well
        source = torch.arange(18).view(2, 9) + 3
        ones = torch.ones_like(source)
        with experts, torch.inference_mode():
            for _ in range(3):
                answer = model(source, ones, source, ones)
            assert experts.stats.misses > 0
        print(answer.double().sum().item())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path), str(3 * slot_bytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, cwd=ROOT, **pipes) as one,
        subprocess.Popen(command, cwd=ROOT, **pipes) as other,
    ):
        assert [one.stdout.readline(), other.stdout.readline()] == ["open\n"] * 2
        for process in (one, other):
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=300)[0] for process in (one, other)]
    source = torch.arange(18).view(2, 9) + 3
    ones = torch.ones_like(source)
    with torch.inference_mode():
        expected = resident(source, ones, source, ones).double().sum().item()
    assert [float(answer) for answer in answers] == pytest.approx([expected] * 2)


def test_three_tiers_give_the_same_and_read_each_expert_of_host_memory_once(saved):
    path, resident, slot_bytes = saved
    dtype = resident.embedding.weight.dtype
    told = []
    experts = open_offloaded(
        path,
        CONFIG,
        dtype,
        8 * slot_bytes,
        lambda *done: told.append(done),
        host_bytes=12 * slot_bytes,
    )
    model = load_model(path, experts=experts)
    with experts, torch.inference_mode():
        assert told[-1] == (12 + len(experts.plan.pinned), 12 + len(experts.plan.pinned))
        assert len(experts.plan.host) == 12
        for seed in range(4):
            source, target = random_ids(3, 9, seed), random_ids(3, 5, seed + 9)
            ones = torch.ones_like
            expected = resident(source, ones(source), target, ones(target))
            assert torch.equal(model(source, ones(source), target, ones(target)), expected)
        stats = experts.stats
        assert stats.host_loads > 0
        assert stats.copied_bytes == stats.host_loads * slot_bytes
        assert stats.read_bytes > 0
        assert experts.fallbacks == ()

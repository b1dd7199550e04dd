"""Texts that are read by kernels, in the matrix unit, equal those read by torch."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba")

from engine.checkpoint import load_model, save_model
from engine.config_parts import Rotary
from engine.convert import inspect
from engine.errors import CheckpointError
from engine.experts import load_offloaded
from engine.kernels.attach import attach_kernels
from engine.kernels.processor import has_tiles
from engine.kernels.sweep import ROW_STEP, can_sweep
from engine.model.context import Past
from engine.model.transformer import Transformer, set_invariant
from tests.hf_families import widen
from tests.test_engine_invariant import assert_alone_and_together
from tests.test_engine_kernels_offloaded import Quantized
from tests.test_engine_kernels_steps import LEARNED, SIGMOID, without
from tests.tiny import DENSE, LLAMA, MIXTRAL, MOE, random_ids, tiny_model

pytestmark = pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix unit for bf16")

SHAPE = {"d_model": 64, "d_kv": 32, "d_ff": 96}
WIDE = replace(LLAMA, **SHAPE, rotary=Rotary(width=32))
EXPERTS = replace(MIXTRAL, **SHAPE, rotary=Rotary(width=32))
SIGMOIDS = replace(SIGMOID, **SHAPE, rotary=Rotary(width=32))
CONFIGS = {
    "llama": WIDE,
    "half turned, scaled": replace(WIDE, rotary=Rotary(width=16), attention_scale=0.4),
    "wide heads": replace(WIDE, d_kv=96, rotary=Rotary(width=96), num_decoder_layers=1),
    "learned, biases": replace(LEARNED, **SHAPE),
    "windows, sinks, norms": replace(
        WIDE, windows=(0, 5, 40), attention_sinks=True, query_key_norm="head"
    ),
    "width norm, clip": replace(WIDE, query_key_norm="width", clip_qkv=0.7),
    "mixtral": EXPERTS,
    "sigmoid, choice bias": SIGMOIDS,
    "shared expert": replace(EXPERTS, shared_d_ff=32, shared_gate=True),
    "shared, ungated": replace(SIGMOIDS, shared_d_ff=64, gated=False, activation="gelu"),
    "expert biases": replace(
        EXPERTS, expert_bias=True, activation="clamped_swiglu", expert_d_ff=32
    ),
    "expert groups": replace(SIGMOIDS, expert_groups=3, top_groups=2, group_score="best_two"),
}
LENGTHS = (45, 1, 100, 16, 33)


def make(name, **changes):
    """A model of a config with random weights of all kinds."""
    model = widen(tiny_model(replace(CONFIGS[name], max_positions=1024, **changes))).bfloat16()
    for layer in model.moe_layers():
        if hasattr(layer, "choice_bias"):  # in fp32, as it is stored
            layer.choice_bias.data = layer.choice_bias.data.float()
    return model


def texts(lengths, seed=1):
    """Ids and segments of texts with padding behind them."""
    segments = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return random_ids(len(lengths), max(lengths), seed), segments


@torch.inference_mode()
def read(model, lengths=LENGTHS, seed=1):
    """What is kept of texts, without padding, (N, W)."""
    tokens, segments = texts(lengths, seed)
    return model.encode(tokens, segments)[segments > 0]


def assert_as_near(ours, theirs, exact):
    """Not further from double precision than torch is."""
    assert exact.std() > 0.05
    our_error, their_error = (ours - exact).abs(), (theirs - exact).abs()
    assert 0 < our_error.mean() <= 1.1 * their_error.mean()


def exact_of(model):
    """The same weights in double precision."""
    return without(model).double()


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].num_experts])
def test_is_as_near_as_torch(name):
    model = make(name)
    exact, theirs = read(exact_of(model)), read(model)
    assert attach_kernels(model)
    assert model.sweep_kernels is not None
    assert_as_near(read(model), theirs, exact)


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].num_experts])
def test_mixtures_are_as_near_as_torch(name):
    """One MoE layer of two: an expert chosen otherwise would decide over what is behind."""
    model = make(name, num_decoder_layers=2, dense_layers=("decoder-1",))
    exact, theirs = read(exact_of(model)), read(model)
    assert attach_kernels(model)
    ours = read(model)
    far = [(found - exact).abs().amax(-1) > 0.1 * exact.std() for found in (ours, theirs)]
    is_near = ~(far[0] | far[1])
    assert is_near.float().mean() > 0.8  # tokens of which no expert was chosen otherwise
    assert far[0].sum() <= far[1].sum() + 8
    assert_as_near(ours[is_near], theirs[is_near], exact[is_near])


SOME = ["llama", "windows, sinks, norms", "shared expert", "expert groups"]


@pytest.mark.parametrize("name", SOME)
def test_a_text_gets_the_same_bits_alone_and_among_others(name):
    model = make(name)
    assert attach_kernels(model)
    together = torch.split(read(model), LENGTHS)
    tokens, segments = texts(LENGTHS)
    for row, length in enumerate(LENGTHS):
        with torch.inference_mode():
            alone = model.encode(tokens[row : row + 1, :length], segments[row : row + 1, :length])
        assert torch.equal(alone[0], together[row])


def test_a_text_gets_the_same_bits_in_invariant_mode():
    """Which needs nothing of sweeps by kernels, but must not keep them from their work."""
    model = make("mixtral")
    assert attach_kernels(model)
    expected = read(model)
    set_invariant(model)
    assert torch.equal(read(model), expected)


@pytest.mark.parametrize("name", SOME)
@torch.inference_mode()
def test_what_is_read_on_has_the_bits_of_what_is_read_at_once(name):
    """Past texts of any length, in any place, and with padding of their own."""
    model = make(name)
    assert attach_kernels(model)
    lengths, begun = (70, 41, 64, 5), (33, 1, 32, 4)
    tokens, segments = texts(lengths)
    whole = model.encode(tokens, segments)
    before = model.encode(tokens[:, : max(begun)], segments[:, : max(begun)])
    for row, length in enumerate(begun):
        before[row, length:] = torch.nan  # nobody's
    rest = [tokens[row, begun[row] : lengths[row]] for row in range(4)]
    left = [len(row) for row in rest]
    real = (torch.arange(max(left)) < torch.tensor(left).unsqueeze(1)).long()
    padded = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)
    layers = model.go_on_layers(padded, real, Past(before, torch.tensor(begun)))
    found = finish(layers)
    for row, length in enumerate(lengths):
        assert torch.equal(found[row, : left[row]], whole[row, begun[row] : length])


def finish(layers):
    """What a pass returns at its end."""
    while True:
        try:
            next(layers)
        except StopIteration as end:
            return end.value


@torch.inference_mode()
def test_passes_that_take_turns_do_not_disturb_each_other():
    """Nor does one that is given up; what room they had is used again, or made larger."""
    model = make("mixtral")
    assert attach_kernels(model)
    first, second = texts((40, 20), seed=3), texts((7, 90, 11), seed=4)
    expected = [model.encode(*each) for each in (first, second)]
    passes = [model.encode_layers(*each) for each in (first, second)]
    given_up = model.encode_layers(*texts((300,), seed=5))
    for _ in range(2):
        for each in (*passes, given_up):
            next(each)
    given_up.close()
    for each, whole in zip(passes, expected, strict=True):
        assert torch.equal(finish(each), whole)
    long = texts((ROW_STEP + 50, 3), seed=6)
    assert torch.equal(
        model.encode(*long)[1, :3], model.encode(long[0][1:, :3], long[1][1:, :3])[0]
    )
    assert torch.equal(model.encode(*second), expected[1])


@torch.inference_mode()
def test_rows_without_a_token():
    model = make("llama")
    assert attach_kernels(model)
    tokens, segments = texts((20, 9))
    segments[0] = 0
    found = model.encode(tokens, segments)
    assert torch.equal(found[1, :9], model.encode(tokens[1:, :9], segments[1:, :9])[0])
    assert not found[0].any()
    segments[1] = 0
    assert not model.encode(tokens, segments).any()
    assert model.encode(tokens[:, :0], segments[:, :0]).shape[1] == 0


@torch.inference_mode()
def test_embeddings_that_are_given():
    """As those of soft prompts are."""
    model = make("learned, biases")
    assert attach_kernels(model)
    tokens, segments = texts(LENGTHS)
    embedded = model.embedding(tokens)
    assert torch.equal(model.encode(tokens, segments, embedded), model.encode(tokens, segments))
    embedded[0, 3] += 1
    assert not torch.equal(model.encode(tokens, segments, embedded), model.encode(tokens, segments))


@pytest.mark.parametrize("name", ["mixtral", "expert biases"])
def test_offloaded_experts_give_the_bits_of_resident_ones(tmp_path, name):
    save_model(make(name), tmp_path / "m", dtype=torch.bfloat16)
    resident = load_model(tmp_path / "m")
    assert attach_kernels(resident)
    blob_bytes = inspect(tmp_path / "m")["experts"]["blob_bytes"]
    for slots in (2, 100):
        model, experts = load_offloaded(tmp_path / "m", None, slots * blob_bytes)
        with experts:
            assert attach_kernels(model)
            assert torch.equal(read(model), read(resident))
            assert slots == 100 or experts.stats.misses > 0


def test_a_damaged_expert_fails_its_pass_and_the_next_one_is_right(tmp_path):
    save_model(make("mixtral"), tmp_path / "m", dtype=torch.bfloat16)
    blob_bytes = inspect(tmp_path / "m")["experts"]["blob_bytes"]
    file = tmp_path / "m" / "experts-decoder-1.safetensors"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    for expert in range(4):
        damaged[-1000 - expert * blob_bytes] ^= 4
    model, experts = load_offloaded(tmp_path / "m", None, 2 * blob_bytes)
    with experts:
        assert attach_kernels(model)
        expected = read(model)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read(model, seed=2)
        file.write_bytes(whole)
        assert torch.equal(read(model), expected)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_experts_are_as_near_as_without_kernels(quantization):
    model = make("mixtral", num_decoder_layers=2, dense_layers=("decoder-1",))
    lending = Transformer(model.config, Quantized(model.experts, quantization)).bfloat16().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("experts.")}
    lending.load_state_dict(state)
    exact, theirs = read(exact_of(model)), read(lending)
    assert attach_kernels(lending)
    assert lending.sweep_kernels is not None
    ours = read(lending)
    near = (exact - ours).abs().amax(-1) < exact.std()
    assert near.float().mean() > 0.8
    assert (ours - theirs)[near].abs().mean() < 0.1 * exact.std()


def test_any_number_of_threads_gives_the_same_bits():
    model, threads = make("shared expert"), torch.get_num_threads()
    assert attach_kernels(model)
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(read(model))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_answers_after_texts_that_kernels_read():
    """Steps go on from what sweeps kept."""
    model = make("windows, sinks, norms")
    tokens, segments = texts((30, 61))
    fed, found = random_ids(2, 6, seed=9), []
    plain, exact = without(model), exact_of(model)
    assert attach_kernels(model)
    for each in (model, plain, exact):
        with torch.inference_mode():
            cache = each.start_cache(each.encode(tokens, segments), segments, 6)
            parts = torch.split(fed, 1, 1)
            found.append(torch.cat([each.logits(each.step(part, cache)) for part in parts], 1))
    assert_as_near(*found)


def test_what_does_not_fit_is_left_to_torch():
    """Widths that fill no tile, fp32, encoders, training, and rows of several documents."""
    for config, dtype in (
        (replace(WIDE, d_ff=100), torch.bfloat16),
        (replace(WIDE, d_kv=24, rotary=Rotary(width=24)), torch.bfloat16),
        (replace(EXPERTS, expert_d_ff=40), torch.bfloat16),
        (replace(EXPERTS, shared_d_ff=40), torch.bfloat16),
        (WIDE, torch.float32),
        (replace(DENSE, **SHAPE), torch.bfloat16),
        (replace(MOE, **SHAPE), torch.bfloat16),
    ):
        model = tiny_model(config).to(dtype)
        assert not can_sweep(model)
        assert attach_kernels(model)
        assert model.sweep_kernels is None
    model = make("llama")
    plain = copy.deepcopy(model)
    assert attach_kernels(model)
    tokens, segments = texts((20, 20))
    with torch.enable_grad():
        kept = model.encode(tokens, segments)
        assert kept.requires_grad
        assert torch.equal(kept, plain.encode(tokens, segments))
    segments[:, 12:] = 2
    with torch.inference_mode():
        assert torch.equal(model.encode(tokens, segments), plain.encode(tokens, segments))


@torch.inference_mode()
def test_steps_of_which_experts_get_many_rows_use_tiles(tmp_path):
    """Resident and offloaded experts give the same bits, as near as torch's."""
    save_model(make("expert biases"), tmp_path / "m", dtype=torch.bfloat16)
    resident = load_model(tmp_path / "m")
    plain, exact = without(resident), exact_of(resident)
    assert attach_kernels(resident)
    source, fed = random_ids(24, 6, seed=3), random_ids(24, 3, seed=4)
    segments = torch.ones_like(source)
    kept = plain.encode(source, segments)

    def scores(model, kept):
        cache = model.start_cache(kept, segments, 3)
        parts = torch.split(fed, 1, 1)
        return torch.cat([model.logits(model.step(part, cache)) for part in parts], 1)

    ours, theirs, truth = scores(resident, kept), scores(plain, kept), scores(exact, kept.double())
    near = (ours - truth).abs().amax(-1) < truth.std()
    assert near.float().mean() > 0.8
    assert_as_near(ours[near], theirs[near], truth[near])
    blob_bytes = inspect(tmp_path / "m")["experts"]["blob_bytes"]
    model, experts = load_offloaded(tmp_path / "m", None, 2 * blob_bytes)
    with experts:
        assert attach_kernels(model)
        assert torch.equal(scores(model, kept), ours)
    set_invariant(resident)
    alone = resident.start_cache(kept[5:6], segments[5:6], 1)
    together = resident.start_cache(kept, segments, 1)
    assert torch.equal(
        resident.step(fed[5:6, :1], alone)[0], resident.step(fed[:, :1], together)[5]
    )


@pytest.mark.parametrize("name", ["mixtral", "windows, sinks, norms"])
def test_requests_alone_and_together_in_invariant_mode(name):
    """Through the engine: texts of all lengths, read in sweeps with whichever come."""
    model = make(name)
    assert attach_kernels(model)
    set_invariant(model)
    plans = [("abc a" * (3 * number % 16 + 1), 4, number // 2) for number in range(12)]
    assert_alone_and_together(model, plans, 6, 200)

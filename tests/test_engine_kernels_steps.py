"""Steps by kernels equal those by torch, for all that a config may ask for."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("numba")

from engine.beam import beam_search
from engine.cache import RowCache
from engine.config_parts import Rotary
from engine.generation import generate
from engine.kernels.attach import attach_kernels
from engine.kernels.step import POSITION_STEP
from engine.kernels.team import the_team
from engine.model.layers import Linear
from engine.model.packed import can_pack, pack_linears
from engine.model.transformer import Transformer, set_invariant
from engine.prompt import build_request
from engine.request import BeamParams, Piece, SamplingParams
from tests.hf_families import widen
from tests.test_engine_invariant import assert_alone_and_together
from tests.tiny import DENSE, LLAMA, MIXTRAL, MOE, byte_tokenizer, random_ids, tiny_model

LEARNED = replace(
    LLAMA,
    positions="learned",
    rotary=None,
    norm="layer",
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    gated=False,
    activation="relu",
    num_kv_heads=0,
    tied_embeddings=True,
    position_offset=2,
    embedding_scale=3.0,
)
SIGMOID = replace(
    MIXTRAL,
    num_experts=6,
    num_experts_per_token=3,
    router="sigmoid",
    choice_bias=True,
    routed_scale=1.7,
    router_bias=True,
)
CONFIGS = {
    "dense": DENSE,
    "relu, tied, scaled": replace(
        DENSE, activation="relu", gated=False, tied_embeddings=True, scale_logits=True
    ),
    "cpm_2": MOE,
    "base_layer": replace(MOE, router="base_layer"),
    "default": replace(MOE, router="default", dense_layers=("decoder-0",)),
    "llama": LLAMA,
    "odd widths": replace(
        LLAMA, d_model=37, d_ff=29, d_kv=6, rotary=Rotary(width=4), attention_scale=0.4
    ),
    "wide heads": replace(LLAMA, d_kv=86, rotary=Rotary(width=86), num_decoder_layers=1),
    "learned": LEARNED,
    "sinusoidal": replace(LEARNED, positions="sinusoidal", head_bias=True, tied_embeddings=False),
    "windows, sinks": replace(
        LLAMA, windows=(0, 5, 3), attention_sinks=True, query_key_norm="head"
    ),
    "width norm, clip": replace(LLAMA, query_key_norm="width", clip_qkv=0.7),
    "clip alone": replace(LLAMA, clip_qkv=0.5),
    "mixtral": MIXTRAL,
    "gates as they are": replace(MIXTRAL, normalize_gates=False, routed_scale=2.0),
    "sigmoid, choice bias": SIGMOID,
    "shared expert": replace(MIXTRAL, shared_d_ff=20, shared_gate=True),
    "shared, ungated": replace(SIGMOID, shared_d_ff=70, gated=False, activation="gelu"),
    "expert biases": replace(
        MIXTRAL, expert_bias=True, activation="clamped_swiglu", expert_d_ff=21
    ),
    "all experts": replace(MIXTRAL, num_experts_per_token=4),
    "expert groups": replace(SIGMOID, expert_groups=3, top_groups=2, group_score="best_two"),
    "sparsemixer": replace(MIXTRAL, router="sparsemixer", router_jitter=0.2),
}
BY_KERNELS = [name for name in CONFIGS if name not in ("expert groups", "sparsemixer")]


def make(name, dtype=torch.float32, **changes):
    """A model of a config with random weights of all kinds, and kernels."""
    model = widen(tiny_model(replace(CONFIGS[name], **changes))).to(dtype)
    for layer in model.moe_layers():
        if hasattr(layer, "choice_bias"):  # in fp32, as it is stored
            layer.choice_bias.data = layer.choice_bias.data.float()
    assert attach_kernels(model)
    return model


@contextmanager
def without_kernels(model):
    """The model as torch computes it."""
    kernels = {module: module.kernels for module in model.modules() if "kernels" in vars(module)}
    for module in kernels:
        module.kernels = None
    try:
        yield model
    finally:
        for module, own in kernels.items():
            module.kernels = own


def begin(model, lengths=(3, 11, 7), capacity=24, seed=1):
    """A cache of rows that have read texts of such lengths."""
    source = random_ids(len(lengths), max(lengths), seed)
    segments = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return model.start_cache(model.encode(source, segments), segments, capacity)


@torch.inference_mode()
def steps(model, cache, fed_BT):
    """Scores (B, T, V) of tokens that are given one by one."""
    parts = torch.split(fed_BT, 1, 1)
    return torch.cat([model.logits(model.step(part, cache)) for part in parts], 1)


class Recorded:
    """Lends the experts of another source, and tells what was wanted."""

    def __init__(self, experts):
        self.experts, self.wanted = experts, []

    def foresee(self, layer, x_ND):
        assert x_ND.dtype in (torch.float32, torch.bfloat16)

    def stream(self, layer, wanted):
        self.wanted += wanted
        assert len({*wanted}) == len(wanted)
        yield from reversed([*self.experts.stream(layer, wanted)])


def lent(model):
    """The same weights, with experts that come from elsewhere."""
    source = Recorded(model.experts)
    lending = Transformer(model.config, source).to(model.embedding.weight.dtype)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("experts.")}
    lending.load_state_dict(state)
    assert attach_kernels(lending)
    return lending.eval()


def without(model):
    """The same weights without kernels, which hold addresses of their own."""
    plain = Transformer(model.config)
    plain.to(model.embedding.weight.dtype).load_state_dict(model.state_dict())
    return plain.eval()


@torch.inference_mode()
def assert_equal_steps(model, lengths, fed_BT, skip=0):
    """Scores as exact as torch's, in double precision; `skip` tokens are read at once, by torch."""
    found, plain = [], without(model)
    for each in (model, plain, without(model).double()):
        cache = begin(each, lengths, fed_BT.shape[1])
        before = cache.lengths_B.clone()
        if skip:
            each.read_on(fed_BT[:, :skip], cache)
        found.append(steps(each, cache, fed_BT[:, skip:]))
        assert torch.equal(cache.lengths_B, before + fed_BT.shape[1])
        assert cache.longest == cache.lengths_B.max()
    ours, theirs, exact = found
    # torch itself is up to 4.2e-4 away, where scores spread by 6
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4 * exact.std().item())
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
    return ours


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_torch(name):
    model = make(name)
    scores = assert_equal_steps(model, (3, 11, 7), random_ids(3, 20, seed=2))
    assert scores.std() > 0.1


@pytest.mark.parametrize("name", ["dense", "llama", "windows, sinks", "learned"])
def test_equals_torch_beyond_the_positions_that_were_built_for(name):
    """Texts and answers on both sides of the first tables' end; windows within them."""
    model = make(name, max_positions=2 * POSITION_STEP)
    long = POSITION_STEP - 4
    lengths, skip = ((long, 2), 0) if model.config.is_decoder_only else ((2, 3), long)
    assert_equal_steps(model, lengths, random_ids(2, skip + 10, seed=2), skip)


def test_texts_longer_than_any_answer():
    """Scores of cross-attention need more room than those of the decoder itself."""
    model = make("dense")
    assert_equal_steps(model, (700, 1, 300), random_ids(3, 3))
    assert_equal_steps(model, (1,), random_ids(1, 3))


def join(model, caches, lengths, seed):
    """Append rows with texts of such lengths to caches."""
    source = random_ids(len(lengths), max(lengths), seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    encoded = model.encode(source, real.long())
    for cache in caches:
        cache.append(encoded, lengths, [40] * len(lengths))


def assert_equal_views(model, plain, fast, begin_row, end, seed):
    """One step of some rows of two caches, one by torch and one by kernels."""
    tokens = random_ids(end - begin_row, 1, seed)
    with without_kernels(model):
        expected = model.logits(model.step(tokens, plain.view(begin_row, end)))
    found = model.logits(model.step(tokens, fast.view(begin_row, end)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.std().item())
    for cache in (plain, fast):
        cache.advance(begin_row, end, 1)


@pytest.mark.parametrize("name", ["dense", "mixtral", "windows, sinks"])
@torch.inference_mode()
def test_rows_that_join_leave_and_move(name):
    """Views of a row cache, of parts of it too, and more rows than were built for."""
    model = make(name)
    plain, fast = caches = RowCache(model), RowCache(model)
    moves = [(1, []), (3, []), (0, [0, 1]), (9, []), (0, [4, 2, 8]), (12, [0]), (0, [16, 15])]
    for turn, (joins, leaves) in enumerate(moves):
        if joins:
            join(model, caches, [1 + (7 * turn + 5 * i) % 12 for i in range(joins)], turn)
        for row in leaves:
            plain.remove(row)
            fast.remove(row)
        rows = len(fast)
        assert_equal_views(model, plain, fast, 0, rows, 2 * turn)
        if rows > 1:
            assert_equal_views(model, plain, fast, 0, rows // 2, 2 * turn)
            assert_equal_views(model, plain, fast, rows // 2, rows, 2 * turn + 1)


def alone_and_together(model, rows, count=4, length=5):
    """Scores of rows in one batch, and of each alone; texts of several lengths."""
    fed = random_ids(rows, count, seed=3)
    lengths = [1 + (3 * row) % length for row in range(rows)]
    with torch.inference_mode(), without_kernels(model):
        cache = begin(model, lengths, count)
    own = [
        replace(
            cache,
            self_keys=[part[row : row + 1].clone() for part in cache.self_keys],
            self_values=[part[row : row + 1].clone() for part in cache.self_values],
            cross_keys=[part[row : row + 1] for part in cache.cross_keys],
            cross_values=[part[row : row + 1] for part in cache.cross_values],
            cross_bias=cache.cross_bias[row : row + 1],
            lengths_B=cache.lengths_B[row : row + 1].clone(),
        )
        for row in range(rows)
    ]
    together = steps(model, cache, fed)
    alone = [steps(model, each, fed[row : row + 1]) for row, each in enumerate(own)]
    return together, torch.cat(alone)


@pytest.mark.parametrize("name", BY_KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(name):
    model = make(name)
    for rows in (3, 16):
        together, alone = alone_and_together(model, rows)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["dense", "cpm_2", "llama", "mixtral", "shared expert"])
def test_a_row_has_the_same_bits_in_invariant_mode_in_bf16(name):
    model = make(name, torch.bfloat16)
    set_invariant(model)
    for rows in (16, 33):
        together, alone = alone_and_together(model, rows)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["dense", "mixtral", "shared expert"])
def test_many_rows_in_bf16_err_no_more_than_torch(name):
    """Where there is a matrix unit rows are rounded for it, as torch rounds them."""
    model = make(name, torch.bfloat16)
    exact = copy.deepcopy(without(model)).float()
    for rows in (5, 40):
        fed, lengths = random_ids(rows, 5, seed=2), [1 + row % 9 for row in range(rows)]
        with torch.inference_mode():
            expected = steps(exact, begin(exact, lengths), fed)
            ours = steps(model, begin(model, lengths), fed)
            with without_kernels(model):
                theirs = steps(model, begin(model, lengths), fed)
        assert (ours - expected).abs().mean() <= 1.5 * (theirs - expected).abs().mean()


def test_invariant_mode_may_begin_after_kernels_were_attached():
    model = make("llama", torch.bfloat16)
    alone_and_together(model, 8)  # built for the other mode
    set_invariant(model)
    together, alone = alone_and_together(model, 8)
    assert torch.equal(together, alone)


def test_any_number_of_threads_gives_the_same_bits():
    before, teams, found = torch.get_num_threads(), set(), []
    shallow = {"num_decoder_layers": 1}  # threads wait long for one another on a busy machine
    model, fed = make("shared expert", **shallow), random_ids(5, 1, seed=2)
    with torch.inference_mode():
        cache = begin(model, (3, 1, 9, 4, 5))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            teams.add(the_team())
            for each in (
                model,
                make("shared expert", **shallow),
            ):  # in parts for one thread, and for these
                found.append(steps(each, copy.deepcopy(cache), fed))
        assert all(torch.equal(each, found[0]) for each in found)
    finally:
        torch.set_num_threads(before)
        for team in teams:
            team.close()


def test_nan_in_one_row_spoils_no_other():
    for name in BY_KERNELS:
        model = make(name)
        with torch.inference_mode():
            cache, fed = begin(model, (3, 2, 4)), random_ids(3, 3, seed=2)
            expected = steps(model, copy.deepcopy(cache), fed)
            cache.self_keys[0][1, :, 0] = torch.nan
            cache.self_values[-1][1, :, 0] = torch.inf
            if cache.cross_keys:
                cache.cross_values[0][1] = torch.nan
            found = steps(model, cache, fed)
        assert found[1].isnan().any(-1).any()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", [n for n in BY_KERNELS if CONFIGS[n].num_experts])
def test_lent_experts_in_any_order_give_the_bits_of_resident_ones(name):
    model = make(name)
    with torch.inference_mode():
        cache, fed = begin(model, (3, 2, 4, 9, 5)), random_ids(5, 4, seed=2)
    expected, lending = steps(model, copy.deepcopy(cache), fed), lent(model)
    assert torch.equal(steps(lending, cache, fed), expected)
    assert len({*lending.experts.wanted}) > 1


@pytest.mark.parametrize("name", [n for n in BY_KERNELS if CONFIGS[n].num_experts])
def test_scores_of_experts_that_are_nan_still_choose_some(name):
    model = lent(make(name))
    layer, num_experts = model.moe_layers()[-1], model.config.num_experts
    scores = layer.router.weight if hasattr(layer, "router") else layer.centroids
    fed, whole = random_ids(2, 2), scores.detach().clone()
    with torch.inference_mode():
        cache = begin(model, (3, 2))
        expected = steps(model, copy.deepcopy(cache), fed)
        for broken in (slice(0, num_experts), slice(1, 2), slice(0, 1)):
            scores.data[broken] = torch.nan
            model.experts.wanted.clear()
            steps(model, copy.deepcopy(cache), fed)
            assert {*model.experts.wanted} <= {*range(num_experts)}
            assert len(model.experts.wanted) >= model.config.num_experts_per_token
            scores.data[:] = whole
        assert torch.equal(steps(model, cache, fed), expected)


def test_choice_biases_are_read_as_they_are_stored():
    """In fp32 beside weights in bf16, or in bf16 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        model = lent(make("sigmoid, choice bias", torch.bfloat16))
        for layer in model.moe_layers():
            layer.choice_bias.data = torch.tensor([0.0, 9.0, 0.0, 0.0, 9.0, 9.0], dtype=dtype)
        assert attach_kernels(model)
        with torch.inference_mode():
            cache = begin(model, (3, 2))
            model.experts.wanted.clear()
            steps(model, cache, random_ids(2, 2))
        assert {*model.experts.wanted} == {1, 4, 5}


def test_weights_of_files_that_are_mapped_into_memory(tmp_path):
    model = make("relu, tied, scaled", torch.bfloat16)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors")
    mapped = Transformer(model.config).bfloat16().eval()
    mapped.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    assert attach_kernels(mapped)
    with torch.inference_mode():
        cache, fed = begin(model, (3, 2)), random_ids(2, 4)
    expected = steps(model, copy.deepcopy(cache), fed)
    assert torch.equal(steps(mapped, cache, fed), expected)


def test_steps_in_all_modes_of_autograd_leave_no_graph():
    """A program that was made in one mode runs in the others."""
    model, fed = make("sigmoid, choice bias"), random_ids(4, 4, seed=2)
    with torch.no_grad():
        cache = begin(model, (1, 5, 3, 2))
    few = replace(
        cache,
        self_keys=[part[:1].clone() for part in cache.self_keys],
        self_values=[part[:1].clone() for part in cache.self_values],
        lengths_B=cache.lengths_B[:1].clone(),
    )
    expected = steps(model, copy.deepcopy(cache), fed)  # built for 4 rows in inference mode
    assert attach_kernels(model)
    with torch.inference_mode():
        model.step(fed[:1, :1], copy.deepcopy(few))
    found = []
    for column in range(4):
        with torch.set_grad_enabled(column % 2 == 0):
            hidden = model.step(fed[:, column : column + 1], cache)
            found.append(model.logits(hidden))
        assert not hidden.requires_grad
        assert not found[-1].requires_grad
    assert torch.equal(torch.cat(found, 1), expected)


def test_results_are_not_overwritten_by_the_next_step():
    model, fed = make("llama"), random_ids(2, 2)
    with torch.inference_mode():
        cache = begin(model, (3, 2))
        first = model.step(fed[:, :1], cache)
        kept = first.clone()
        model.step(fed[:, 1:], cache)
    assert torch.equal(first, kept)


def test_scores_of_states_of_any_shape():
    model = make("llama")
    states = torch.randn(2, 3, model.config.d_model, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.logits(states)
        assert expected.shape == (2, 3, model.config.vocab_size)
        assert torch.equal(model.logits(states[1, 2]), expected[1, 2])
        assert torch.equal(model.logits(states.transpose(0, 1)), expected.transpose(0, 1))
        assert model.logits(states[:0]).shape == (0, 3, model.config.vocab_size)


@pytest.mark.parametrize("name", ["cpm_2", "mixtral"])
def test_whole_answers_are_those_of_torch(name):
    model = make(name)
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
    request = build_request("some text", byte_tokenizer(), model.config, params, "r")

    def tokens():
        made = [e for e in generate(model, byte_tokenizer(), request) if isinstance(e, Piece)]
        return [token for piece in made for token in piece.token_ids]

    with without_kernels(model):
        expected = tokens()
    assert tokens() == expected
    assert len(expected) == 12


@pytest.mark.parametrize("name", ["cpm_2", "windows, sinks"])
def test_beams_are_those_of_torch(name):
    model = make(name)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    request = build_request("some text", byte_tokenizer(), model.config, params, "r")

    def search():
        return beam_search(model, byte_tokenizer(), request, BeamParams(num_beams=4))

    with torch.inference_mode():
        found = search()
        with without_kernels(model):
            expected = search()
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], 1e-3)
    assert len(found) == 4


@pytest.mark.parametrize(("name", "dtype"), [("cpm_2", torch.float32), ("mixtral", torch.bfloat16)])
def test_requests_of_an_engine_have_the_same_bits_alone_and_together(name, dtype):
    model = make(name, dtype)
    set_invariant(model)
    plans = [("abc a" * (3 * number % 16 + 1), 5, number // 2) for number in range(9)]
    assert_alone_and_together(model, plans, 6, 200)


@pytest.mark.parametrize("name", ["dense", "llama"])
def test_layers_of_a_cache_may_move_one_by_one(name):
    """As those of beams do: they are no arena, and some may come to lie where they lay before."""
    model, fed = make(name, num_decoder_layers=3), random_ids(2, 6)
    model.decoder.layers[1].self_attention.out.weight.data *= 3
    with torch.inference_mode():
        cache = begin(model, (3, 2))
        expected = steps(model, copy.deepcopy(cache), fed)
        layers = (cache.self_keys, cache.self_values, cache.cross_keys, cache.cross_values)
        found = []
        for column in range(6):
            found.append(model.logits(model.step(fed[:, column : column + 1], cache)))
            for tensors in layers:
                for index in (1, 2) if column % 2 else (1,):
                    if tensors:
                        before, tensors[index] = tensors[index], tensors[index].clone()
                        before.fill_(torch.nan)
    assert torch.equal(torch.cat(found, 1), expected)


def test_a_full_cache_is_refused_and_stays_as_it_is():
    model, fed = make("llama"), random_ids(2, 5)
    with torch.inference_mode():
        cache = begin(model, (3, 2), capacity=4)
        steps(model, cache, fed[:, :4])
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="8 positions do not fit the cache of 7"):
            model.step(fed[:, 4:], cache)
    assert torch.equal(cache.lengths_B, before.lengths_B)
    assert all(map(torch.equal, cache.self_keys, before.self_keys))


def test_a_cache_of_another_dtype_is_our_own_mistake():
    model = make("llama")
    with torch.inference_mode():
        cache = begin(model, (3, 2))
        cache.self_keys = [keys.bfloat16() for keys in cache.self_keys]
        with pytest.raises(AssertionError):
            model.step(random_ids(2, 1), cache)


def test_tensors_with_gaps_are_refused():
    model = tiny_model(LLAMA)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(LLAMA.d_model, LLAMA.vocab_size).T)
    assert attach_kernels(model)
    with pytest.raises(ValueError, match="without gaps"):
        model.logits(torch.zeros(1, LLAMA.d_model))
    model.decoder.layers[0].wi_0 = None
    qkv = model.decoder.layers[0].self_attention.qkv
    qkv.weight = torch.nn.Parameter(qkv.weight.detach().T.contiguous().T)
    with pytest.raises(ValueError, match="without gaps"):
        attach_kernels(model)


def test_bounds_on_normed_heads_are_left_to_torch():
    model = tiny_model(replace(LLAMA, query_key_norm="head", clip_qkv=0.7))
    assert not attach_kernels(model)
    assert model.kernels is None


@pytest.mark.skipif(not can_pack(torch.float32), reason="this CPU packs no fp32")
def test_packed_models_are_left_to_torch():
    model = tiny_model(DENSE)
    pack_linears(model, Linear)
    assert not attach_kernels(model)
    assert model.kernels is None

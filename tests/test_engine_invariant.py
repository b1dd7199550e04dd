"""In invariant mode a request gives the same bits alone and in any batch.

Mixes of all sorts of requests are in test_engine_invariant_mixes.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.cache import RowCache
from engine.checkpoint import load_model, save_model
from engine.engine import Engine
from engine.experts import load_offloaded
from engine.generation import generate
from engine.loading import read_storage
from engine.model.attention import attend
from engine.model.layers import Linear, rms_norm
from engine.model.packed import can_pack, pack_linears
from engine.model.spans import make_spans, round_up_keys
from engine.model.tiles import in_tiles, in_vectors
from engine.model.transformer import set_invariant
from engine.prepare import prepare
from engine.prompt import build_request
from engine.random_model import write_random_model
from engine.request import Failed, Finished, Piece, Request, SamplingParams
from engine.scheduler import Limits
from tests.tiny import DENSE, MOE, byte_tokenizer, random_ids, tiny_model

TOKENIZER = byte_tokenizer()
WIDE = replace(MOE, d_ff=64, num_experts=6)  # int4 comes in groups of 32 and more
CONFIGS = {
    "dense": DENSE,
    "relu, tied, scaled": replace(
        DENSE, activation="relu", gated=False, tied_embeddings=True, scale_logits=True
    ),
    "moe": MOE,
    "base_layer": replace(MOE, router="base_layer"),
    "uneven": replace(DENSE, num_decoder_layers=3, d_ff=100),  # no whole vectors
}
KINDS = [
    *((name, dtype) for name in CONFIGS for dtype in (torch.float32, torch.bfloat16)),
    *(("packed", dtype) for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)),
    *((f"served {name}", dtype) for name in CONFIGS for dtype in (torch.float32, torch.bfloat16)),
]


@cache
def invariant_model(name, dtype):
    config = CONFIGS.get(name.removeprefix("served "), DENSE)
    model = tiny_model(config, seed=5).to(dtype)
    if name == "packed":
        pack_linears(model, Linear)
    if name.startswith("served "):
        prepare(model)
    set_invariant(model)
    return model


@dataclass(frozen=True, eq=False)
class Job:
    """A request as the engine sees it."""

    request: Request
    is_cancelled: Callable[[], bool] = lambda: False
    submitted: float = 0.0


def run(model, arrivals, limits):
    """Tokens and log-probabilities of each request; they arrive at their turns."""
    engine = Engine(model, TOKENIZER, limits)
    found = {request: [] for requests in arrivals.values() for request in requests}
    turn = 0
    while turn <= max(arrivals) or engine.running or engine.num_waiting():
        for request in arrivals.get(turn, ()):
            engine.add(Job(request))
        for job, event in engine.turn():
            assert not isinstance(event, Failed), event
            if isinstance(event, Piece):
                found[job.request].append((event.token_ids, event.text, event.logprobs))
        turn += 1
        assert turn < 2000
    return found


def alone(model, request):
    return run(model, {0: [request]}, Limits(max_rows=1, window_s=0.0))[request]


def assert_alone_and_together(model, plans, max_rows, sweep):
    arrivals = {}
    for number, (text, length, turn) in enumerate(plans):
        params = SamplingParams(max_tokens=length, logprobs=3, ignore_eos=True)
        request = build_request(text, TOKENIZER, model.config, params, str(number))
        arrivals.setdefault(turn, []).append(request)
    limits = Limits(max_rows=max_rows, max_sweep_tokens=sweep, window_s=0.0)
    for request, together in run(model, arrivals, limits).items():
        assert together
        assert together == alone(model, request)
        events = [e for e in generate(model, TOKENIZER, request) if not isinstance(e, Finished)]
        assert together == [(e.token_ids, e.text, e.logprobs) for e in events]


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_with_offloaded_experts(tmp_path, quantization):
    write_random_model(tmp_path / "m", WIDE, torch.bfloat16, quantization=quantization)
    slot_bytes = read_storage(tmp_path / "m").slot_bytes
    model, experts = load_offloaded(tmp_path / "m", None, 8 * slot_bytes)
    prepare(model)
    set_invariant(model)
    plans = [("abc a" * (3 * number % 16 + 1), 4, number // 2) for number in range(9)]
    with experts:
        assert_alone_and_together(model, plans, 6, 200)
        assert experts.stats.misses


@pytest.mark.parametrize("name", ["dense", "served dense"])
def test_a_row_of_many_at_different_positions(name):
    """Lengths on both sides of what keys are rounded up to, and more rows than a tile has."""
    model = invariant_model(name, torch.float32)
    lengths = [1, 2, 63, 64, 65, 66, 90, *range(3, 20)]
    with torch.inference_mode():
        cache_all, rows = RowCache(model), []
        for number, length in enumerate(lengths):
            source = random_ids(1, length, seed=number)
            encoded = model.encode(source, torch.ones_like(source))
            alone_cache = RowCache(model)
            for each in (alone_cache, cache_all):
                each.append(encoded, [length], [length + 8])
            tokens = random_ids(1, length, seed=number + 100)
            model.step(tokens, alone_cache.view())
            alone_cache.advance(0, 1, length)
            model.step(tokens, cache_all.view(number))
            cache_all.advance(number, number + 1, length)
            rows.append(alone_cache)
        tokens = random_ids(len(lengths), 1, seed=7)
        for _ in range(3):
            hidden = model.step(tokens, cache_all.view())
            cache_all.advance(0, len(lengths), 1)
            logits = model.logits(hidden[:, -1])
            for number, each in enumerate(rows):
                own = model.step(tokens[number : number + 1], each.view())
                each.advance(0, 1, 1)
                assert torch.equal(own[0], hidden[number])
                assert torch.equal(model.logits(own[0, -1]), logits[number])


@settings(max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
)
def test_scoring_pads_without_a_trace(kind, lengths, seed):
    model = invariant_model(*kind)
    sources = [random_ids(1, source, seed + i) for i, (source, _) in enumerate(lengths)]
    targets = [random_ids(1, target, seed - i) for i, (_, target) in enumerate(lengths)]

    def padded(parts):
        longest = max(part.shape[1] for part in parts)
        return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])

    with torch.inference_mode():
        source, target = padded(sources), padded(targets)
        logits = model(source, (source > 0).long(), target, (target > 0).long())
        for row, (one, other) in enumerate(zip(sources, targets, strict=True)):
            own = model(one, torch.ones_like(one), other, torch.ones_like(other))
            assert torch.equal(own[0], logits[row, : other.shape[1]])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_the_model_computes(name):
    plain, model = tiny_model(CONFIGS[name], seed=5), invariant_model(name, torch.float32)
    source, target = random_ids(3, 21), random_ids(3, 9, seed=1)
    segments = torch.ones_like(source)
    segments[1, 7:] = 0
    ones = torch.ones_like(target)
    with torch.inference_mode():
        expected = plain(source, segments, target, ones)
        torch.testing.assert_close(
            model(source, segments, target, ones), expected, atol=1e-4, rtol=1e-4
        )
        row_cache = model.start_cache(model.encode(source, segments), segments, 9)
        steps = [model.step(target[:, :4], row_cache)]
        steps += [model.step(target[:, i : i + 1], row_cache) for i in range(4, 9)]
        logits = model.logits(torch.cat(steps, 1))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_several_documents_in_a_row_are_refused():
    model = invariant_model("dense", torch.float32)
    source = random_ids(1, 4)
    for segments in ([[1, 1, 2, 2]], [[0, 1, 1, 1]]):
        with pytest.raises(ValueError, match="rows of one document, with padding after it"):
            model.encode(source, torch.tensor(segments))


# the parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 32), (48, 100), (768, 256)])
def test_a_row_of_a_tile_does_not_depend_on_place_and_neighbours(dtype, outputs, inputs):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(70, inputs, generator=torch.Generator().manual_seed(2)).to(dtype)

    def product(tile):
        return F.linear(tile, weight)

    together = in_tiles(product, x, 16)
    assert together.shape == (70, outputs)
    for row in range(70):
        assert torch.equal(in_tiles(product, x[row], 16), together[row])
    assert torch.equal(in_tiles(product, x.flip(0), 16).flip(0), together)
    torch.testing.assert_close(together, product(x), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 48, 64, 100, 40_000])
def test_elementwise_functions_are_computed_in_whole_vectors(dtype, width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(3)).to(dtype)

    def gelu(part):
        return F.gelu(part, approximate="tanh")

    together = in_vectors(gelu, x)
    assert together.shape == x.shape
    torch.testing.assert_close(together, gelu(x))
    for row in range(5):
        assert torch.equal(in_vectors(gelu, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_does_not_depend_on_the_number_of_rows(dtype):
    x = torch.randn(65, 100, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = torch.linspace(0.5, 2, 100).to(dtype)
    together = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[i], weight, 1e-6), together[i]) for i in range(65))


def test_spans_attend_as_the_whole_does():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(4, 2, 3, 8, generator=generator) for _ in range(3))
    lengths = [3, 1, 1, 2]
    visible = torch.arange(3) < torch.tensor(lengths).view(4, 1, 1, 1)
    bias = torch.randn(4, 2, 3, 3, generator=generator).masked_fill(~visible, -1e30)
    spans = make_spans(bias, lengths, [round_up_keys(n) for n in lengths], together=True)
    assert [(span.rows.start, span.rows.stop) for span in spans] == [(0, 1), (1, 3), (3, 4)]
    assert {span.keys for span in spans} == {64}
    expected, found = attend(q, k, v, bias), attend(q, k, v, spans)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length])
        assert not found[row, length:].any()


def test_keys_are_rounded_up():
    assert [round_up_keys(n) for n in (1, 64, 65)] == [64, 64, 128]


# packed weights


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float32, 1e-4)])
def test_packed_weights_multiply_as_plain_ones(tmp_path, dtype, error):
    if not can_pack(dtype):
        pytest.skip("this CPU has no product for it")
    save_model(tiny_model(MOE), tmp_path / "m", dtype=dtype)
    plain, packed = load_model(tmp_path / "m"), load_model(tmp_path / "m")
    pack_linears(packed, Linear)
    pack_linears(packed, Linear)  # nothing is left to be packed
    source, target = random_ids(2, 9), random_ids(2, 5)
    given = (source, torch.ones_like(source), target, torch.ones_like(target))
    with torch.inference_mode():
        torch.testing.assert_close(packed(*given), plain(*given), rtol=error, atol=error)
    assert packed.lm_head.weight.is_mkldnn
    assert not packed.embedding.weight.is_mkldnn


def test_only_bf16_and_fp32_are_packed():
    assert not can_pack(torch.float16)
    assert not can_pack(torch.int8)

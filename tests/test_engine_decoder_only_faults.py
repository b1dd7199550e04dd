"""What decoder-only models got wrong once: beams, masks as wide as long, memory, accounts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.batch
import engine.model.masks
import engine.model.transformer
from engine.beam import beam_search
from engine.cache import RowCache
from engine.config_parts import LatentAttention, Rotary
from engine.engine import Engine
from engine.errors import RequestError
from engine.footprint import Workload, cache_bytes, workspace_bytes
from engine.model.transformer import set_invariant
from engine.request import BeamParams, Finished, Pooling, PromptLogprobs
from engine.scheduler import Limits
from tests.engine_jobs import TOKENIZER, Job, alone, make_request, pieces, run
from tests.test_engine_decoder_only import CONFIGS, MODELS, WINDOWED, read_logits
from tests.test_engine_planning import PeakBytes, peak_bytes
from tests.tiny import LLAMA, MIXTRAL, random_ids, tiny_model

LATENT = replace(
    LLAMA,
    num_kv_heads=0,
    d_kv=12,
    latent=LatentAttention(query_rank=0, rank=8, plain_width=8, value_width=8),
    rotary=Rotary(width=4),
)


@pytest.fixture
def short_parts(monkeypatch):
    """Masks are made for four queries at once."""
    for module in (engine.model.masks, engine.model.transformer):
        monkeypatch.setattr(module, "MASK_QUERIES", 4)
    monkeypatch.setattr(engine.batch, "READ_TOKENS", 4)


def choose_beams(model, request, num_beams):
    """The slow way: each open text is read anew for each token; no end mark may come."""
    texts = {(): 0.0}
    for _ in range(request.params.max_tokens):
        longer = {}
        for ids, logprob in texts.items():
            scores = read_logits(model, [*request.encoder_ids, *ids])[-1].float().log_softmax(-1)
            scores[[0, 1, 2]] = -torch.inf
            values, tokens = scores.topk(num_beams)
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            longer |= {(*ids, token): logprob + value for token, value in pairs}
        texts = dict(sorted(longer.items(), key=lambda item: -item[1])[:num_beams])
    return [(ids, logprob / len(ids)) for ids, logprob in texts.items()]


@pytest.mark.parametrize("name", CONFIGS)
def test_beams_read_the_whole_prompt(name):
    model = MODELS[name]
    request = make_request("some text", CONFIGS[name], max_tokens=4, ignore_eos=True)
    expected = choose_beams(model, request, 3)
    found = beam_search(model, TOKENIZER, request, BeamParams(num_beams=3))
    assert [one.token_ids for one in found] == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_masks_in_parts_equal_whole_ones(name, request):
    model, ids = MODELS[name], random_ids(3, 11, seed=8)
    segments = torch.ones_like(ids)
    segments[1, 6:] = 2  # two documents in a row
    segments[2, 5:] = 0  # and padding
    more, alike = random_ids(3, 6, seed=9), torch.ones(3, 6, dtype=torch.int64)

    def compute():
        with torch.no_grad():
            context = model.encode(ids[:, :7], segments[:, :7] > 0)
            decoded = model.decode(more, alike, context, segments[:, :7] > 0)
            return model.read(ids, segments)[segments > 0], decoded

    expected = compute()
    request.getfixturevalue("short_parts")
    torch.testing.assert_close(compute(), expected)


@pytest.mark.parametrize("name", ["llama", "windowed"])
def test_in_invariant_mode_masks_in_parts_change_no_bit_beside_others(name, short_parts):
    model = tiny_model(CONFIGS[name], seed=5)
    set_invariant(model)
    texts = ["a rather long text", "short", "x", "one of the same size"]
    requests = [make_request(text, CONFIGS[name], max_tokens=3, logprobs=2) for text in texts]
    apart = [run(Engine(model, TOKENIZER, Limits()), {0: [Job(one)]}) for one in requests]
    jobs = [Job(one) for one in requests]
    together = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    for job, events in zip(jobs, apart, strict=True):
        assert pieces(together[job]) == pieces(*events.values())


def test_a_step_reads_few_of_the_prompts_whose_scores_are_asked_for(short_parts, monkeypatch):
    model, sizes = MODELS["llama"], []
    params = {"max_tokens": 2, "prompt_logprobs": 0}
    requests = [make_request(text, LLAMA, **params) for text in ("abcdefghi", "ihgfedcba", "ab")]
    expected = [alone(model, one) for one in requests]
    step = model.step

    def noted(tokens, cache):
        sizes.append(tokens.numel())
        return step(tokens, cache)

    monkeypatch.setattr(model, "step", noted)
    jobs = [Job(one) for one in requests]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    assert max(sizes) <= 4
    for job, other in zip(jobs, expected, strict=True):
        assert pieces(events[job]) == pieces(other)
        (told,), (known,) = (
            [[t.logprob for t in e.tokens] for e in found if isinstance(e, PromptLogprobs)]
            for found in (events[job], other)
        )
        assert told == pytest.approx(known, nan_ok=True)


@settings(max_examples=5)
@given(
    config=st.builds(
        replace,
        st.sampled_from([LLAMA, MIXTRAL, WINDOWED, LATENT, replace(LLAMA, num_kv_heads=1)]),
        d_model=st.sampled_from([16, 64]),
        num_decoder_layers=st.sampled_from([3]),
        vocab_size=st.sampled_from([384, 5000]),
        max_positions=st.just(1024),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    load=st.builds(
        Workload,
        rows=st.integers(1, 3),
        source_tokens=st.sampled_from([1, 120, 600]),
        target_tokens=st.just(3),
    ),
)
def test_nothing_takes_more_than_caches_and_workspace(config, dtype, load):
    planned = cache_bytes(config, dtype, load)
    planned += workspace_bytes(config, dtype, load, quantized_on_gpu=None)
    assert peak_bytes(config, dtype, load) <= planned


def test_the_workspace_of_a_long_prompt_grows_with_its_length_and_not_with_its_square():
    def needed(length):
        load = Workload(source_tokens=length, target_tokens=1)
        return workspace_bytes(LLAMA, torch.float32, load, quantized_on_gpu=None)

    assert needed(65536) < 2.1 * needed(32768)


@torch.inference_mode()
def test_rows_of_one_text_do_not_copy_it_for_each_on_its_way_to_the_caches():
    model = tiny_model(LLAMA)
    ids = random_ids(1, 60)
    context = model.encode(ids, torch.ones_like(ids))
    with PeakBytes(model) as counter:
        cache = RowCache(model)
        cache.append(context, [60] * 8, [4] * 8, [0] * 8)
        assert counter.peak < cache.nbytes + 4 * context.nbytes


def test_samples_of_one_text_equal_each_alone():
    model = MODELS["llama"]
    requests = [
        make_request("once more", LLAMA, max_tokens=6, temperature=1.0, seed=seed)
        for seed in range(5)
    ]
    jobs = [Job(one) for one in requests]
    events = run(Engine(model, TOKENIZER, Limits()), {0: jobs})
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(model, job.request))


def test_a_vector_of_a_text_is_refused():
    engine = Engine(MODELS["llama"], TOKENIZER, Limits())
    with pytest.raises(RequestError, match="has no encoder") as info:
        engine.check(replace(make_request("text", LLAMA, max_tokens=1), task=Pooling()))
    assert info.value.field == "input"


def test_only_what_was_kept_counts_as_cached():
    engine = Engine(MODELS["llama"], TOKENIZER, Limits(encoder_cache_bytes=1 << 20))

    def cached(text, **params):
        request = replace(make_request(text, LLAMA, max_tokens=2, **params), salt="s")
        (events,) = run(engine, {0: [Job(request)]}).values()
        assert isinstance(events[-1], Finished)
        return events[-1].cached_tokens, request.num_prompt_positions

    assert cached("hello") == (0, 5)
    assert cached("hello") == (4, 5)  # the last one is read to go on from it
    assert cached("hello", prompt_logprobs=0) == (0, 5)
    assert cached("hello", prompt_logprobs=0) == (0, 5)  # nothing was read ahead, nothing is kept
    assert cached("x") == cached("x") == (0, 1)

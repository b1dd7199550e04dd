"""Decoder-only models in the engine: the prompt is read in a sweep, in the encoder's place."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import Adapter, Slots
from engine.beam import beam_search
from engine.engine import Engine
from engine.errors import PromptTooLong, RequestError
from engine.generation import Generation
from engine.model.context import Past
from engine.model.transformer import set_invariant
from engine.prompt import build_request
from engine.request import (
    BeamParams,
    Continuations,
    Failed,
    Finished,
    PromptLogprobs,
    SamplingParams,
    Scored,
)
from engine.sampling import penalize
from engine.scheduler import Limits
from engine.scoring import make_question, score
from tests.engine_jobs import TOKENIZER, Job, alone, make_request, pieces, run, without_times
from tests.tiny import LLAMA, MIXTRAL, random_ids, tiny_model

WINDOWED = replace(LLAMA, windows=(0, 5, 3), attention_sinks=True, query_key_norm="head")
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
    num_kv_heads=0,
    tied_embeddings=True,
)
CONFIGS = {"llama": LLAMA, "mixtral": MIXTRAL, "windowed": WINDOWED, "learned": LEARNED}
# in double precision no two scores are so near that the order of sums decides between them
MODELS = {name: tiny_model(config, seed=5).double() for name, config in CONFIGS.items()}


def run_through(layers):
    while True:
        try:
            next(layers)
        except StopIteration as end:
            return end.value


def read_logits(model, ids):
    """The slow way: the whole text read anew."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return model.logits(model.read(tokens, torch.ones_like(tokens)))[0].clone()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_steps_after_a_context_equal_reading_anew(name):
    model, tokens = MODELS[name], random_ids(3, 14, seed=1)
    lengths = [8, 3, 0]
    segments = (torch.arange(8) < torch.tensor(lengths).unsqueeze(1)).long()
    with torch.no_grad():
        context = model.encode(tokens[:, :8], segments)
        cache = model.start_cache(context, segments, 6)
        new = torch.stack([row[n : n + 4] for row, n in zip(tokens, lengths, strict=True)])
        first = model.logits(model.step(new, cache))
        more = torch.stack([row[n + 4 : n + 5] for row, n in zip(tokens, lengths, strict=True)])
        second = model.logits(model.step(more, cache))
    for row, length in enumerate(lengths):
        expected = read_logits(model, tokens[row, : length + 5].tolist())[length:]
        torch.testing.assert_close(torch.cat([first[row], second[row]]), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_on_after_a_context_equals_reading_anew(name):
    model, tokens = MODELS[name], random_ids(2, 12, seed=3)
    lengths = [7, 4]
    kept = (torch.arange(7) < torch.tensor(lengths).unsqueeze(1)).long()
    new = torch.stack([row[n : n + 5] for row, n in zip(tokens, lengths, strict=True)])
    ones = torch.ones_like(new)
    with torch.no_grad():
        context = model.encode(tokens[:, :7], kept)
        cached = model.decode(new, ones, context, kept)
        more = run_through(model.go_on_layers(new, ones, Past(context, torch.tensor(lengths))))
        whole = model.encode(tokens[:1], torch.ones_like(tokens[:1]))
    torch.testing.assert_close(torch.cat([context, more], 1)[:1], whole)
    torch.testing.assert_close(model.encode(tokens[:, :7], kept), context)  # for gradients
    prompt = context.clone().requires_grad_()
    states = model.decode(new, ones, prompt, kept)  # without a cache, for gradients
    torch.testing.assert_close(states.detach(), cached)
    (gradient,) = torch.autograd.grad(states.sum(), prompt)
    assert gradient[1, :4].abs().sum() > 0
    assert gradient[1, 4:].abs().sum() == 0  # padding is not read


def test_gradients_reach_a_soft_prompt():
    model, ids = MODELS["llama"], random_ids(1, 6, seed=4)  # gates would be in fp32
    x = torch.randn(1, 6, LLAMA.d_model, dtype=torch.float64, requires_grad=True)
    ones = torch.ones_like(ids)

    def loss(x):
        context = model.encode(ids, ones, x)
        return model.logits(model.decode(ids[:, :2], ones[:, :2], context, ones))[0, -1, 7]

    (gradient,) = torch.autograd.grad(loss(x), x)
    step = torch.zeros_like(x)
    step[0, 2, 3] = 1e-6
    with torch.no_grad():
        slope = (loss(x + step) - loss(x - step)) / 2e-6
    assert gradient[0, 2, 3].item() == pytest.approx(slope.item(), rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_in_one_row_do_not_see_one_another(name):
    model, tokens = MODELS[name], random_ids(1, 12, seed=2)
    segments = torch.tensor([[1] * 5 + [2] * 6 + [0]])
    with torch.no_grad():
        together = model.logits(model.read(tokens, segments))[0]
    torch.testing.assert_close(together[:5], read_logits(model, tokens[0, :5].tolist()))
    torch.testing.assert_close(together[5:11], read_logits(model, tokens[0, 5:11].tolist()))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_equals_reading_anew(name):
    model = MODELS[name]
    request = make_request("hello", CONFIGS[name], max_tokens=12, ignore_eos=True)
    ids = list(request.encoder_ids)
    never = [0, 1, 2]
    for _ in range(12):
        scores = read_logits(model, ids)[-1]
        scores[[*never, *range(TOKENIZER.vocab_size, CONFIGS[name].vocab_size)]] = -torch.inf
        ids.append(int(scores.argmax()))
    made = [i for piece in pieces(alone(model, request)) for i in piece.token_ids]
    assert made == ids[5:]


PLANS = st.lists(
    st.tuples(
        st.text("abc <", min_size=1, max_size=30),
        st.integers(1, 12),
        st.sampled_from([0.0, 1.0]),
        st.integers(0, 12),
        st.one_of(st.none(), st.integers(0, 20)),
        st.sampled_from([(), ("a",), ("bc", "q")]),
        st.sampled_from([{}, {"top_k": 4}, {"prompt_logprobs": 2}]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(
    plans=PLANS,
    max_rows=st.integers(1, 5),
    sweep=st.integers(1, 60),
    name=st.sampled_from(["llama", "mixtral", "windowed"]),
)
def test_together_equals_alone(plans, max_rows, sweep, name):
    model = MODELS[name]
    limits = Limits(max_rows=max_rows, max_sweep_tokens=sweep, window_s=0.0)
    engine = Engine(model, TOKENIZER, limits)
    jobs, cancel_at, arrivals = [], {}, {}
    for number, (text, length, temperature, turn, cancel, stop, more) in enumerate(plans):
        params = dict(max_tokens=length, temperature=temperature, seed=number, stop=stop, **more)
        request = make_request(text, CONFIGS[name], False, str(number), **params)
        flags = []
        job = Job(request, is_cancelled=lambda flags=flags: bool(flags))
        jobs.append((job, cancel))
        arrivals.setdefault(turn, []).append(job)
        if cancel is not None:
            cancel_at[cancel] = flags
    events = run(engine, arrivals, cancel_at)
    for job, cancel in jobs:
        expected, got = alone(model, job.request), events[job]
        if cancel is None or (got and isinstance(got[-1], Finished)):
            assert pieces(got) == pieces(expected)
            assert without_times(got[-1]) == without_times(expected[-1])
            assert len([e for e in got if isinstance(e, Finished | Failed)]) == 1
        else:
            assert pieces(got) == pieces(expected)[: len(pieces(got))]
    assert engine.running == 0


def test_prompt_logprobs_are_those_of_the_whole_prompt():
    model = MODELS["llama"]
    request = make_request("some text", LLAMA, max_tokens=1, prompt_logprobs=1)
    (told,) = [e for e in alone(model, request) if isinstance(e, PromptLogprobs)]
    ids = list(request.encoder_ids)
    expected = read_logits(model, ids).log_softmax(-1)
    assert [token.token_id for token in told.tokens] == ids
    assert math.isnan(told.tokens[0].logprob)
    for place, token in enumerate(told.tokens[1:]):
        assert token.logprob == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_scores_of_continuations_follow_the_prompt(name):
    model = MODELS[name]
    request = make_request("abcd", CONFIGS[name], max_tokens=1)
    choices = [[70, 71, 72], [80]]
    (scores,) = score(model, TOKENIZER, [make_question(request, choices, TOKENIZER)])
    for choice, found in zip(choices, scores, strict=True):
        ids = [*request.encoder_ids, *choice]
        log_probs = read_logits(model, ids).log_softmax(-1)
        expected = [log_probs[i - 1, ids[i]].item() for i in range(4, len(ids))]
        assert found.logprobs == pytest.approx(expected)
    asked = replace(request, task=Continuations(choices=tuple(map(tuple, choices))))
    engine = Engine(model, TOKENIZER, Limits())
    events = run(engine, {0: [job := Job(asked)]})
    (scored,) = [event for event in events[job] if isinstance(event, Scored)]
    assert [s.total for s in scored.scores] == pytest.approx([s.total for s in scores])


def test_beam_search_finds_what_the_engine_finds():
    model, params = MODELS["llama"], BeamParams(num_beams=3)
    request = make_request("abc", LLAMA, max_tokens=5)
    expected = beam_search(model, TOKENIZER, request, params)
    engine = Engine(model, TOKENIZER, Limits())
    events = run(engine, {0: [job := Job(replace(request, task=params))]})
    found = events[job][0].answers
    assert [answer.token_ids for answer in found] == [one.token_ids for one in expected]


def test_a_soft_prompt_stands_in_front_of_the_text():
    model = MODELS["llama"]
    vectors = torch.randn(3, LLAMA.d_model, generator=torch.Generator().manual_seed(1)).double()
    adapter = Adapter(name="a", version="1", prompt_PD=vectors, slots=Slots(front=3))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    request = build_request("hello", TOKENIZER, LLAMA, params, "r", adapter=adapter)
    ids = list(request.encoder_ids)
    for _ in range(6):
        embedded = torch.cat([vectors, model.embedding(torch.tensor(ids)).detach()]).unsqueeze(0)
        ones = torch.ones(embedded.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            scores = model.logits(model.read(ones, ones, embedded))[0, -1]
        scores[[0, 1, 2]] = -torch.inf
        ids.append(int(scores.argmax()))
    engine = Engine(model, TOKENIZER, Limits())
    plain = make_request("hello", LLAMA, max_tokens=6, ignore_eos=True)
    jobs = [Job(request), Job(plain)]
    events = run(engine, {0: jobs})
    made = [[i for piece in pieces(events[job]) for i in piece.token_ids] for job in jobs]
    assert made[0] == ids[5:]
    assert made[1] == [i for piece in pieces(alone(model, plain)) for i in piece.token_ids]


def test_a_prompt_that_was_read_before_is_not_read_again():
    engine = Engine(MODELS["llama"], TOKENIZER, Limits(encoder_cache_bytes=1 << 20))
    first, second = (replace(make_request("hello", LLAMA, max_tokens=3), salt="s") for _ in "ab")
    events = run(engine, {0: [a := Job(first)], 30: [b := Job(second)]})
    assert pieces(events[a]) == pieces(events[b])
    assert (engine.known.hits, engine.known.partial_hits) == (1, 0)
    assert engine.known.hit_tokens == events[b][-1].cached_tokens == len(second.source.ids)


@pytest.mark.parametrize("name", ["llama", "windowed"])
def test_of_a_prompt_that_begins_with_a_known_one_only_the_rest_is_read(name):
    model, start = MODELS[name], "the same beginning, "
    engine = Engine(model, TOKENIZER, Limits(encoder_cache_bytes=1 << 20))
    read = []
    inner = model.go_on_layers

    class Counting:
        def __getattr__(self, attribute):
            return getattr(model, attribute)

        def go_on_layers(self, tokens, segments, past):
            read.append(tokens.shape[1])
            return inner(tokens, segments, past)

    engine = Engine(Counting(), TOKENIZER, Limits(encoder_cache_bytes=1 << 20))
    texts = [start, f"{start}and more", f"{start}and others", f"{start}and"]
    made = [make_request(t, CONFIGS[name], max_tokens=5, ignore_eos=True) for t in texts]
    jobs = [Job(replace(request, salt="s")) for request in made]
    others = [Job(replace(made[1], salt="t")), Job(made[1])]  # strangers to it
    events = run(engine, {0: jobs[:1], 40: jobs[1:] + others})
    for job in [*jobs, *others]:
        assert pieces(events[job]) == pieces(alone(model, job.request))
    assert sorted(read) == [0, 5, 8]  # of "and", "and others", "and more"
    told = [events[job][-1].cached_tokens for job in [*jobs, *others]]
    assert told[0] == told[4] == told[5] == 0
    assert min(told[1:4]) >= len(start) - 1
    known = engine.known
    assert (known.hits, known.partial_hits, known.misses) == (0, 3, 2)  # of those with a salt
    assert known.hit_tokens == sum(told)


def test_vectors_of_another_adapter_share_no_beginning():
    model = MODELS["llama"]
    engine = Engine(model, TOKENIZER, Limits(encoder_cache_bytes=1 << 20))
    jobs = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        vectors = torch.randn(3, LLAMA.d_model, generator=generator).double()
        adapter = Adapter(name=f"a{number}", version="1", prompt_PD=vectors, slots=Slots(front=3))
        for end in ("one", "two"):
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            text = f"the same beginning, {end}"
            request = build_request(text, TOKENIZER, LLAMA, params, "r", adapter=adapter)
            jobs.append(Job(replace(request, salt="s")))
    events = run(engine, {20 * turn: [job] for turn, job in enumerate(jobs)})
    for job in jobs:
        assert pieces(events[job]) == pieces(alone(model, job.request))
    told = [events[job][-1].cached_tokens for job in jobs]
    assert told[0] == told[2] == 0
    assert told[1] == told[3] == 20


@pytest.mark.parametrize("name", ["llama", "mixtral", "windowed"])
def test_in_invariant_mode_a_batch_changes_no_bit(name):
    model = tiny_model(CONFIGS[name], seed=6)
    set_invariant(model)
    texts = ["a", "some longer text " * 3, "hello there", "abc" * 21, "x" * 70, "yz"]
    more = {"ignore_eos": True, "logprobs": 2, "temperature": 1.0}
    made = [
        make_request(text, CONFIGS[name], max_tokens=8 + 3 * number, seed=number, **more)
        for number, text in enumerate(texts)
    ]
    made[2] = replace(made[2], params=replace(made[2].params, prompt_logprobs=1))
    made[2] = replace(made[2], num_held=len(made[2].encoder_ids))
    jobs = [Job(request) for request in made]
    together = run(Engine(model, TOKENIZER, Limits(window_s=0.0)), {0: jobs[:3], 2: jobs[3:]})
    for job in jobs:
        (single,) = run(Engine(model, TOKENIZER, Limits()), {0: [job]}).values()
        assert pieces(together[job]) == pieces(single)


def test_a_prompt_counts_for_repetition_and_not_for_presence():
    row = Generation(make_request("aab", LLAMA, max_tokens=4), TOKENIZER, LLAMA)
    a, b = TOKENIZER.encode("ab")
    row.push(b)
    scores = torch.zeros(LLAMA.vocab_size)
    scores[[a, b]] = 6.0
    params = SamplingParams(repetition_penalty=2.0)
    assert penalize(scores, params, row.counts)[[a, b]].tolist() == [3.0, 3.0]
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    assert penalize(scores, params, row.counts)[[a, b]].tolist() == [6.0, 4.5]


def test_what_a_decoder_only_model_cannot_do_is_refused():
    with pytest.raises(RequestError, match="does not fill blanks"):
        make_request("a<span>b", LLAMA, fill=True, max_tokens=4)
    with pytest.raises(
        PromptTooLong, match=r"has 250 tokens and max_tokens is 10; the limit is 256"
    ):
        make_request("a" * 250, LLAMA, max_tokens=10)
    adapter = Adapter(
        name="tail", version="1", prompt_PD=torch.zeros(2, LLAMA.d_model), slots=Slots(back=2)
    )
    with pytest.raises(RequestError, match="tail has vectors behind the text"):
        build_request("a", TOKENIZER, LLAMA, SamplingParams(max_tokens=1), "r", adapter=adapter)

"""Rows of one batch: prompts of the decoder of many lengths, and greedy rows chosen at once."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.engine import Engine
from engine.errors import EngineError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Failed, Piece, PromptLogprobs, SamplingParams
from engine.sampling import GreedyChoice, choose_token
from engine.scheduler import Limits
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}


@dataclass(frozen=True, eq=False)
class Job:
    request: object
    submitted: float = 0.0

    def is_cancelled(self):
        return False


def run(model, requests, **limits):
    engine = Engine(model, TOKENIZER, Limits(**limits))
    jobs = [Job(request) for request in requests]
    events = {job: [] for job in jobs}
    for number, job in enumerate(jobs):
        engine.add(job)
        if number % 2:
            for told, event in engine.turn():
                events[told].append(event)
    while engine.running or len(engine.scheduler):
        for told, event in engine.turn():
            events[told].append(event)
    return [events[job] for job in jobs]


def plain(events):
    """Events without times, and log-probabilities to 9 places: sums come in another order."""
    told = []
    for event in events:
        if isinstance(event, PromptLogprobs | Piece):
            entries = event.tokens if isinstance(event, PromptLogprobs) else event.logprobs
            rounded = [
                (e.token_id, round(e.logprob, 9), [(i, round(p, 9)) for i, p in e.top])
                for e in entries
            ]
            rest = (event.text, event.token_ids) if isinstance(event, Piece) else "prompt"
            told.append((rest, rounded))
        else:
            told.append((event.reason, event.stop_reason, event.completion_tokens, event.seed))
    return told


PLANS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text("abc", min_size=1, max_size=9),
            "given": st.one_of(st.just(""), st.text("xyz ", max_size=40)),
            "max_tokens": st.integers(1, 9),
            "temperature": st.sampled_from([0.0, 0.0, 1.5]),
            "prompt_logprobs": st.sampled_from([None, None, 0, 3]),
            "logprobs": st.sampled_from([None, None, 2]),
            "min_tokens": st.integers(0, 1),
            "include_stop": st.booleans(),
            "stop": st.sampled_from([(), ("a",), ("\x00", "b")]),
            "bad_words": st.sampled_from([(), ((70,), (71, 71)), ((3, 4),)]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 2.0]),
        }
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60)
@given(plans=PLANS, config=st.sampled_from([MOE, DENSE]))
def test_together_equals_alone_with_prompts_of_the_decoder(plans, config):
    model, requests = MODELS[config], []
    for seed, plan in enumerate(plans):
        params = {name: plan[name] for name in plan if name not in ("text", "given")}
        requests.append(
            build_request(
                plan["text"],
                TOKENIZER,
                config,
                SamplingParams(seed=seed, **params),
                str(seed),
                decoder_prompt=plan["given"],
            )
        )
    for request, events in zip(requests, run(model, requests, max_rows=4), strict=True):
        assert plain(events) == plain(generate(model, TOKENIZER, request))
        wanted = request.params.prompt_logprobs is not None
        assert isinstance(events[0], PromptLogprobs) == wanted
        assert not any(isinstance(event, PromptLogprobs) for event in events[1:])


def test_log_probabilities_of_a_prompt_that_are_not_finite_fail_their_row_only():
    model = MODELS[DENSE]
    inner = model.logits

    class Spoiled:
        def __getattr__(self, name):
            return getattr(model, name)

        def logits(self, hidden):
            scores = inner(hidden)
            return scores * torch.nan if len(hidden) == 5 else scores

    params = SamplingParams(max_tokens=3, prompt_logprobs=0, seed=1)
    requests = [
        build_request("a", TOKENIZER, DENSE, params, given, decoder_prompt=given)
        for given in ("xxxxx", "yyyy")
    ]
    failed, fine = run(Spoiled(), requests)
    assert failed == [
        Failed("the engine could not go on: the model gave scores that are not finite")
    ]
    assert plain(fine) == plain(generate(model, TOKENIZER, requests[1]))


def test_room_is_made_for_what_the_decoder_is_given():
    batch = Batch(MODELS[DENSE], cache_bytes=1 << 20)
    assert batch.has_room([4, 4], [10, 10])
    assert not batch.has_room([4, 4], [10, 100_000])


SCORES = st.lists(
    st.lists(
        st.sampled_from([0.0, 1.0, 2.0, -1.0, torch.inf, -torch.inf, torch.nan]),
        min_size=4,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@given(scores=SCORES, data=st.data())
def test_greedy_rows_at_once_equal_row_by_row(scores, data):
    scores_BV = torch.tensor(scores)
    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    bans = [torch.tensor(data.draw(flags)) for _ in scores]
    choice = GreedyChoice()
    for _ in range(2):  # the second time with what was stacked the first time
        got = choice.choose(scores_BV.clone(), bans)
        for token_id, row_V, ban_V in zip(got, scores_BV, bans, strict=True):
            banned_V = row_V.masked_fill(ban_V, -torch.inf)
            try:
                expected = choose_token(banned_V, SamplingParams(), torch.Generator())
            except EngineError:
                expected = None
            assert token_id == expected
    other = [~ban_V for ban_V in bans]
    assert choice.choose(scores_BV.clone(), other) == GreedyChoice().choose(scores_BV, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_and_halves_are_chosen_alike(dtype):
    scores_BV = torch.randn(16, 500, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores_BV = (scores_BV * 4).round() / 4  # many ties
    bans = [torch.rand(500, generator=torch.Generator().manual_seed(i)) < 0.3 for i in range(16)]
    expected = [
        choose_token(row_V.masked_fill(ban_V, -torch.inf), SamplingParams(), torch.Generator())
        for row_V, ban_V in zip(scores_BV, bans, strict=True)
    ]
    assert GreedyChoice().choose(scores_BV, bans) == expected

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.generation import generate
from engine.prompt import build_request, decoder_prefix
from engine.request import SamplingParams, Score
from engine.scoring import make_question, score
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
MODELS = {config: tiny_model(config, seed=5).double() for config in (MOE, DENSE)}


def ask(text, choices, config=MOE, fill=False):
    request = build_request(text, TOKENIZER, config, SamplingParams(), "q", fill=fill)
    return make_question(request, [TOKENIZER.encode(c) for c in choices], TOKENIZER)


@torch.no_grad()
def slowly(model, question):
    """One choice at a time, one token at a time, each by a whole pass."""
    source = torch.tensor([question.request.encoder_ids])
    scores = []
    for choice in question.choices:
        ids = decoder_prefix(question.request, TOKENIZER, model.config)
        found, is_greedy = [], True
        for token in choice:
            decoder = torch.tensor([ids])
            logits = model(source, torch.ones_like(source), decoder, torch.ones_like(decoder))
            log_probs = logits[0, -1].float().log_softmax(-1)
            found.append(float(log_probs[token]))
            is_greedy = is_greedy and int(log_probs.argmax()) == token
            ids.append(token)
        scores.append(Score(tuple(found), is_greedy))
    return scores


QUESTIONS = st.lists(
    st.tuples(
        st.text("abc ", min_size=1, max_size=12),
        st.lists(st.text("xyz", min_size=1, max_size=5), min_size=1, max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(asked=QUESTIONS, max_tokens=st.integers(1, 200), config=st.sampled_from([MOE, DENSE]))
def test_together_equals_token_by_token(asked, max_tokens, config):
    questions = [
        ask(f"{text}<span>" if fill else text, choices, config, fill)
        for text, choices, fill in asked
    ]
    model = MODELS[config]
    for got, question in zip(
        score(model, TOKENIZER, questions, max_tokens), questions, strict=True
    ):
        for one, expected in zip(got, slowly(model, question), strict=True):
            assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
            assert one.is_greedy == expected.is_greedy
            assert one.total == pytest.approx(sum(expected.logprobs), abs=1e-4)
            assert math.exp(-one.mean) >= 1


def test_what_the_model_says_greedily_is_greedy_and_likelier_than_anything_else():
    model = MODELS[MOE]
    request = build_request("abc", TOKENIZER, MOE, SamplingParams(max_tokens=1), "r")
    (piece, _) = generate(
        model,
        TOKENIZER,
        build_request(
            "abc", TOKENIZER, MOE, SamplingParams(max_tokens=1, ignore_eos=True, logprobs=0), "r"
        ),
    )
    others = [[65], [66], [67]]
    question = make_question(request, [piece.token_ids, *others], TOKENIZER)
    ((first, *rest),) = score(model, TOKENIZER, [question])
    assert first.total == pytest.approx(piece.logprobs[0].logprob, abs=1e-5)
    assert all(first.total > other.total for other in rest)


def test_a_blank_is_scored_with_the_sentinel_that_closes_it():
    question = ask("a <span> b", ["x", "yy"], fill=True)
    assert [choice[-1] for choice in question.choices] == [TOKENIZER.sentinel_id(1)] * 2
    assert [len(choice) for choice in question.choices] == [2, 3]


@pytest.mark.parametrize(
    ("text", "choices", "field"),
    [("a", [], "choices"), ("a", ["x", ""], "choices"), ("a<span>b<span>", ["x"], "prompt")],
)
def test_impossible_questions_are_refused(text, choices, field):
    with pytest.raises(RequestError) as caught:
        ask(text, choices, fill="<span>" in text)
    assert caught.value.field == field

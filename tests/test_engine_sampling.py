from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from engine import sampling
from engine.errors import EngineError
from engine.generation import Generation
from engine.prompt import build_request
from engine.request import SamplingParams
from engine.sampling import (
    NEAREST,
    choose_token,
    filter_scores,
    keep_top_p,
    keep_typical,
    penalize,
    tell_logprob,
)
from tests.tiny import DENSE, byte_tokenizer

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])
CONTINUING = replace(DENSE, continuation_sentinel=None)


def draw(params: SamplingParams, logits: torch.Tensor, times: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    picks = [choose_token(logits, params, generator) for _ in range(times)]
    return torch.bincount(torch.tensor(picks), minlength=len(logits)) / times


def test_greedy_takes_the_best_and_the_lowest_id_of_a_tie():
    generator = torch.Generator()
    assert choose_token(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(), generator) == 1


def test_sampling_follows_the_softmax():
    torch.testing.assert_close(
        draw(SamplingParams(temperature=1.0), PROBS.log()), PROBS, atol=0.03, rtol=0
    )


def test_temperature_sharpens():
    expected = (PROBS.log() / 0.5).softmax(-1)
    torch.testing.assert_close(
        draw(SamplingParams(temperature=0.5), PROBS.log()), expected, atol=0.03, rtol=0
    )


def test_top_k_keeps_the_k_best():
    expected = torch.tensor([4 / 7, 3 / 7, 0, 0])
    got = draw(SamplingParams(temperature=1.0, top_k=2), PROBS.log())
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0)
    assert draw(SamplingParams(temperature=1.0, top_k=9), PROBS.log())[3] > 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    got = draw(SamplingParams(temperature=1.0, top_p=0.7), PROBS.log())
    torch.testing.assert_close(got, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03, rtol=0)
    tiny = draw(SamplingParams(temperature=1.0, top_p=1e-9), PROBS.log(), times=50)
    assert tiny.tolist() == [1, 0, 0, 0]
    least = draw(SamplingParams(temperature=1.0, top_p=1e-320), PROBS.log(), times=50)
    assert least.tolist() == [1, 0, 0, 0]


@given(
    scale=st.sampled_from([0.0, 0.1, 2.0, 6.0]),
    top_p=st.floats(1e-6, 1, exclude_max=True),
    steps=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 999),
)
def test_top_p_keeps_what_sorting_all_keeps(scale, top_p, steps, seed):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * scale
    if steps:
        scores = (scores * steps).round() / steps  # with many ties
    ordered, ids = scores.softmax(-1).sort(descending=True, stable=True)
    sums = ordered.cumsum(-1)
    expected = scores.index_fill(-1, ids[(sums - ordered >= top_p) & (sums > ordered)], -torch.inf)
    got = keep_top_p(scores, top_p)
    if not torch.equal(got, expected):  # a sum lies at top_p to within its rounding
        assert (sums - top_p).abs().min() < 1e-5
        assert abs(int(got.isfinite().sum()) - int(expected.isfinite().sum())) <= 30 + 3000 * 1e-3


def test_what_is_drawn_is_never_impossible_wherever_the_number_falls():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    places = {0.0: 1, 0.249: 1, 0.25: 3, 0.74: 3, 0.75: 4, 1 - 2**-53: 4, 1.0: 4}
    for place, expected in places.items():
        assert sampling.find_place(probs, torch.tensor([place], dtype=torch.float64)) == expected


def test_probabilities_that_are_not_finite_are_an_error():
    with pytest.raises(EngineError, match="over the temperature are not finite"):
        sampling.draw(torch.full((9,), torch.nan), torch.Generator())


def test_many_ids_are_drawn_as_often_as_they_should_be():
    probs = torch.rand(1000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    generator = torch.Generator().manual_seed(1)
    picks = torch.tensor([sampling.draw(probs, generator) for _ in range(20_000)])
    expected = probs * len(picks)
    chi_squared = ((torch.bincount(picks, minlength=1000) - expected) ** 2 / expected).sum()
    assert 999 - 4 * 44.7 < chi_squared < 999 + 4 * 44.7  # 4 standard deviations


def test_banned_tokens_never_come():
    logits = PROBS.log()
    logits[0] = -torch.inf
    assert draw(SamplingParams(temperature=2.0), logits)[0] == 0


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 5e-324])
def test_next_to_no_temperature_is_greedy(temperature):
    params = SamplingParams(temperature=temperature)
    assert draw(params, PROBS.log() * 50, times=20).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "scores",
    [
        [0.0, torch.nan, 1.0],
        [torch.nan, torch.nan, torch.nan],
        [0.0, torch.inf, 1.0],
        [-torch.inf, -torch.inf, -torch.inf],
    ],
)
def test_scores_that_are_not_finite_are_an_error(temperature, scores):
    params = SamplingParams(temperature=temperature)
    with pytest.raises(EngineError, match="scores that are not finite"):
        choose_token(torch.tensor(scores), params, torch.Generator())


def test_top_k_keeps_what_ties_with_the_last():
    params = SamplingParams(temperature=1.0, top_k=1)
    got = draw(params, torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(got, torch.tensor([0, 0.5, 0.5]), atol=0.03, rtol=0)


def test_the_same_seed_gives_the_same_draws():
    params = SamplingParams(temperature=1.0)
    draws = [
        [choose_token(PROBS.log(), params, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    ]
    assert draws[0] == draws[1]


SCORES = torch.tensor([[0.0, 3.0, -1.0, 2.5, 2.5, -4.0, 0.25, 1.0]])
FLOATS = st.floats(-8, 8, width=32).filter(lambda x: abs(x) > 1e-3)
ROWS = st.lists(FLOATS, min_size=3, max_size=24, unique=True)


def transformers_filters(scores_1V, params):
    """The warpers of transformers, in the order in which its generate applies them."""
    chain = [hf.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        chain.append(hf.TypicalLogitsWarper(params.typical_p))
    for warper in chain:
        scores_1V = warper(torch.zeros(1, 1, dtype=torch.int64), scores_1V)
    return scores_1V[0]


@given(
    row=ROWS,
    temperature=st.floats(0.1, 2),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
)
def test_filters_equal_those_of_transformers(row, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = torch.tensor(row)
    got = filter_scores(scores, params)
    expected = transformers_filters(scores.unsqueeze(0), params)
    if torch.equal(got.isinf(), expected.isinf()):
        torch.testing.assert_close(got, expected)
    else:  # a sum of probabilities lies at top_p to within its rounding
        probs = filter_scores(scores, replace(params, top_p=1.0, min_p=0.0)).softmax(-1)
        sums = probs.sort(descending=True).values.cumsum(-1)
        assert (sums - top_p).abs().min() < 1e-5


@pytest.mark.parametrize(("scale", "is_enough"), [(1.0, False), (6.0, True)])
def test_typical_sampling_of_many_tokens_equals_that_of_all_sorted(scale, is_enough):
    scores_V = scale * torch.randn(4 * NEAREST, generator=torch.Generator().manual_seed(1))
    probs_V = scores_V.double().softmax(-1)
    entropy = -(probs_V * probs_V.log()).sum()
    distance_V, ids_V = (-probs_V.log() - entropy).abs().sort()
    num_kept = int((probs_V[ids_V].cumsum(-1) < 0.9).sum()) + 1
    assert (num_kept <= NEAREST) == is_enough
    kept_V = keep_typical(scores_V, 0.9)
    assert set(kept_V.isfinite().nonzero().flatten().tolist()) == set(ids_V[:num_kept].tolist())
    assert torch.equal(kept_V[ids_V[:num_kept]], scores_V[ids_V[:num_kept]])


@pytest.mark.parametrize("typical_p", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_typical_sampling_equals_that_of_transformers(typical_p, seed):
    scores = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(temperature=1.0, typical_p=typical_p)
    expected = transformers_filters(scores.unsqueeze(0), params)
    torch.testing.assert_close(filter_scores(scores, params), expected)
    assert 0 < expected.isinf().sum() < 200


@given(
    row=ROWS,
    history=st.lists(st.integers(0, 2), max_size=8),
    penalty=st.floats(0.2, 5),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_equal_their_definitions(row, history, penalty, presence, frequency):
    scores = torch.tensor(row)
    params = SamplingParams(
        repetition_penalty=penalty, presence_penalty=presence, frequency_penalty=frequency
    )
    before = scores.clone()
    got = penalize(scores, params, Counter(history))
    assert torch.equal(scores, before)
    expected = scores.unsqueeze(0)
    if history:
        processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([history]), expected)
    expected = expected[0]
    for token_id, times in Counter(history).items():
        expected[token_id] -= presence + frequency * times
    torch.testing.assert_close(got, expected)


def test_a_bias_is_added_and_can_ban_or_force():
    params = SamplingParams(logit_bias=((1, -100.0), (5, 50.0)))
    assert choose_token(SCORES[0], params, torch.Generator()) == 5
    got = penalize(SCORES[0], params, {})
    torch.testing.assert_close(got - SCORES[0], torch.tensor([0, -100.0, 0, 0, 0, 50, 0, 0]))


def test_a_banned_token_stays_banned_whatever_the_penalties():
    scores = torch.tensor([1.0, -torch.inf, 0.5])
    params = SamplingParams(
        temperature=1.0, repetition_penalty=0.5, presence_penalty=-2.0, logit_bias=((1, 100.0),)
    )
    assert penalize(scores, params, {1: 3})[1] == -torch.inf


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_work_on_greedy_and_on_drawn_tokens(temperature):
    params = SamplingParams(temperature=temperature, presence_penalty=2.0, top_k=1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([1.0, 2.0, 0.0])
    assert choose_token(scores, params, generator, {1: 1}) == 0
    assert choose_token(scores, params, generator, {}) == 1


def test_log_probabilities_are_those_of_the_model_and_agree_with_one_another():
    logits = torch.tensor([0.5, -1.0, 3.0, 2.0])
    expected = logits.log_softmax(-1).tolist()
    told = tell_logprob(logits, 0, 2)
    assert told.token_id == 0
    assert told.logprob == pytest.approx(expected[0])
    assert [i for i, _ in told.top] == [2, 3]
    assert [p for _, p in told.top] == pytest.approx([expected[2], expected[3]])
    best = tell_logprob(logits.bfloat16(), 2, 9)
    assert len(best.top) == 4
    assert best.top[0] == (2, best.logprob)  # the very same float
    assert tell_logprob(logits, 1, 0).top == ()


def test_biases_of_one_id_add_up():
    params = SamplingParams(logit_bias=((1, 2.0), (3, -1.5), (1, 0.5)))
    assert penalize(torch.zeros(4), params, {}).tolist() == [0.0, 2.5, 0.0, -1.5]


@given(row=ROWS, biases=st.dictionaries(st.integers(0, 2), st.floats(-100, 100), min_size=1))
def test_biases_equal_those_of_transformers(row, biases):
    scores = torch.tensor(row)
    params = SamplingParams(logit_bias=tuple(biases.items()))
    processor = hf.SequenceBiasLogitsProcessor([[[i], bias] for i, bias in biases.items()])
    expected = processor(torch.zeros(1, 1, dtype=torch.int64), scores.unsqueeze(0).clone())[0]
    torch.testing.assert_close(penalize(scores, params, {}), expected)


@pytest.mark.parametrize("made", [0, 1, 3, 4])
def test_the_least_length_equals_that_of_transformers(made):
    params = SamplingParams(min_tokens=3)
    row = Generation(
        build_request("a", byte_tokenizer(), CONTINUING, params, "r"), byte_tokenizer(), CONTINUING
    )
    for token_id in [70] * made:
        row.push(token_id)
    processor = hf.MinNewTokensLengthLogitsProcessor(len(row.prefix), 3, [1])
    scores = torch.linspace(-1, 1, CONTINUING.vocab_size)
    expected = processor(torch.tensor([row.history]), scores.unsqueeze(0).clone())[0]
    expected[[0, 2]] = -torch.inf  # marks never come
    assert torch.equal(row.ban(scores), expected)


def test_allowed_tokens_equal_those_of_transformers():
    allowed = (1, 70, 75)
    params = SamplingParams(allowed_token_ids=allowed)
    request = build_request("a", byte_tokenizer(), CONTINUING, params, "r")
    row = Generation(request, byte_tokenizer(), CONTINUING)
    processor = hf.PrefixConstrainedLogitsProcessor(lambda *_: list(allowed), num_beams=1)
    scores = torch.linspace(-1, 1, CONTINUING.vocab_size)
    expected = processor(torch.tensor([row.history]), scores.unsqueeze(0).clone())[0]
    assert torch.equal(row.ban(scores), expected)

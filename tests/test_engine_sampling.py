import pytest
import torch

from engine.errors import EngineError
from engine.request import SamplingParams
from engine.sampling import choose_token

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])


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

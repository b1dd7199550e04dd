"""Masks between prompt and text: what each may see, against what changes when the other does."""

import pytest
import torch

from engine.adapters import Slots
from tests.tiny import DENSE, MOE, byte_tokenizer, tiny_model
from training.tune_masks import encode_masked, visible_keys
from training.tune_model import Scorer, SoftPrompt

SLOTS = Slots(front=2, back=1)
TEXTS = [(40, 41, 42, 43), (50, 51)]
VECTORS = [0, 1, 6], [0, 1, 4]  # of the texts above, vectors around them


def states(mask, texts=TEXTS, scale=1.0, config=MOE):
    generator = torch.Generator().manual_seed(1)
    prompt = SoftPrompt(scale * torch.randn(3, 32, generator=generator), SLOTS, mask)
    return Scorer(tiny_model(config), byte_tokenizer(), prompt).encode(texts)


def test_keys_that_a_mask_leaves():
    segments = torch.tensor([[1, 1, 0]])
    vectors = torch.tensor([[True, False, False]])
    everything = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    for mask, taken in (("full", None), ("prompt_blind", (0, 1)), ("text_blind", (1, 0))):
        expected = torch.tensor(everything)
        if taken:
            expected[taken] = 0
        assert torch.equal(visible_keys(segments, vectors, mask)[0].int(), expected.int())


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_without_a_mask_it_is_the_encoder(config):
    model = tiny_model(config)
    tokens = torch.tensor([[40, 41, 42], [50, 51, 0]])
    segments = (tokens > 0).long()
    x = model.embedding(tokens)
    ours = encode_masked(model, x, segments, torch.zeros_like(segments, dtype=torch.bool), "full")
    theirs = model.encode(tokens, segments)
    real = segments > 0
    assert torch.allclose(ours[real], theirs[real], atol=1e-6)


def test_a_blind_prompt_is_the_same_for_any_text_and_blind_text_for_any_prompt():
    other = [(60, 61, 62, 63), (70, 71)]
    for row, places in enumerate(VECTORS):
        text = [place for place in range(len(TEXTS[row]) + 3) if place not in places]
        blind, others = (states("prompt_blind", texts).states_BSD[row] for texts in (TEXTS, other))
        assert torch.allclose(blind[places], others[places], atol=1e-6)
        assert not torch.allclose(blind[text], others[text], atol=1e-3)
        blind, others = (states("text_blind", scale=s).states_BSD[row] for s in (1.0, 3.0))
        assert torch.allclose(blind[text], others[text], atol=1e-6)
        assert not torch.allclose(blind[places], others[places], atol=1e-3)
        seen, others = (states("full", scale=s).states_BSD[row] for s in (1.0, 3.0))
        assert not torch.allclose(seen[text], others[text], atol=1e-3)

"""What the decoder is given: its own marks and the beginning of the answer."""

from dataclasses import replace

import pytest
import torch

from engine.errors import PromptTooLong, RequestError
from engine.generation import Generation, generate
from engine.grammar import compile_grammar
from engine.prompt import BLANK, build_request, decoder_prefix
from engine.request import BeamParams, Finished, Piece, PromptLogprobs, Request, SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
T5_STYLE = replace(MOE, continuation_sentinel=None)
LIMIT = MOE.max_positions * 4


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def request(prompt="ab", config=MOE, fill=False, decoder_prompt=None, **params):
    params = SamplingParams(**params)
    return build_request(
        prompt, TOKENIZER, config, params, "r", fill=fill, decoder_prompt=decoder_prompt
    )


def answer(model, asked):
    *events, finished = generate(model, TOKENIZER, asked)
    assert isinstance(finished, Finished)
    pieces = [event for event in events if isinstance(event, Piece)]
    tokens = [token for piece in pieces for token in piece.token_ids]
    return tokens, "".join(piece.text for piece in pieces), finished


@pytest.mark.parametrize("given", ["xy", ids("xy")])
@pytest.mark.parametrize("config", [MOE, T5_STYLE])
def test_the_answer_begins_with_what_the_decoder_is_given(given, config):
    asked = request(config=config, decoder_prompt=given)
    assert asked.decoder_ids == tuple(ids("xy"))
    own = decoder_prefix(request(config=config), TOKENIZER, config)
    assert decoder_prefix(asked, TOKENIZER, config) == [*own, *ids("xy")]


@pytest.mark.parametrize("given", [None, "", []])
def test_nothing_given_is_nothing(given):
    assert request(decoder_prompt=given) == request()


@torch.no_grad()
def test_going_on_from_half_an_answer_gives_the_other_half():
    model = tiny_model(seed=11).double()
    whole, text, _ = answer(model, request("abc", max_tokens=20, ignore_eos=True))
    for cut in (1, 7, 19):
        asked = request("abc", decoder_prompt=whole[:cut], max_tokens=20 - cut, ignore_eos=True)
        rest, rest_text, finished = answer(model, asked)
        assert rest == whole[cut:]
        assert finished.completion_tokens == 20 - cut
        assert text.endswith(rest_text)


def test_penalties_count_it():
    row = Generation(request(decoder_prompt="aab"), TOKENIZER, MOE)
    assert row.counts[ids("a")[0]] == 2
    assert row.counts[ids("b")[0]] == 1


def test_half_a_character_in_it_is_made_whole_by_the_answer():
    first, *rest = ids("\u4f60")
    row = Generation(request(decoder_prompt=[first]), TOKENIZER, MOE)
    pieces = [piece for token in rest for piece in row.push(token)]
    assert "".join(piece.text for piece in pieces) == "\u4f60"


def test_too_much_of_it_is_refused_together_with_what_is_to_come():
    assert len(request(decoder_prompt="a" * 100, max_tokens=LIMIT - 100).decoder_ids) == 100
    with pytest.raises(PromptTooLong, match="has 101 tokens and max_tokens is 156; the limit") as e:
        request(decoder_prompt="a" * 101, max_tokens=LIMIT - 100)
    assert e.value.field == "decoder_prompt"
    with pytest.raises(PromptTooLong, match="1,000,000 characters") as e:
        request(decoder_prompt="a" * 1_000_000)
    assert e.value.field == "decoder_prompt"


def test_ids_that_the_model_lacks_are_refused():
    with pytest.raises(RequestError, match="token id 384 is outside the vocabulary") as caught:
        request(decoder_prompt=[384])
    assert caught.value.field == "decoder_prompt"


def test_blanks_begin_with_nothing():
    with pytest.raises(RequestError, match="blanks are filled from their start") as caught:
        request(f"a{BLANK}", fill=True, decoder_prompt="x")
    assert caught.value.field == "decoder_prompt"


def test_a_grammar_takes_no_blanks_no_beams_and_no_half_character():
    grammar = compile_grammar("regex", "a+", TOKENIZER)
    with pytest.raises(RequestError, match="a grammar is for a text to continue") as caught:
        request(f"a{BLANK}", fill=True, grammar=grammar)
    assert caught.value.field == "grammar"
    with pytest.raises(RequestError, match="ends in half a character") as caught:
        request(grammar=grammar, decoder_prompt=ids("\u4f60")[:1])
    assert caught.value.field == "decoder_prompt"
    with pytest.raises(RequestError, match="beam search takes no grammar") as caught:
        replace(request(grammar=grammar), task=BeamParams())
    assert caught.value.field == "grammar"
    with pytest.raises(RequestError, match="beam search takes no bad_words"):
        Request(
            request_id="r",
            encoder_ids=(3,),
            params=SamplingParams(bad_words=((4,),)),
            task=BeamParams(),
        )


@torch.no_grad()
@pytest.mark.parametrize("config", [MOE, T5_STYLE])
@pytest.mark.parametrize("length", [0, 1, 50])
def test_its_log_probabilities_are_those_of_the_model(config, length):
    model = tiny_model(config, seed=3)
    given = [70 + i % 9 for i in range(length)]
    asked = request("abc", config, decoder_prompt=given, max_tokens=3, prompt_logprobs=2)
    first, *_ = generate(model, TOKENIZER, asked)
    assert isinstance(first, PromptLogprobs)
    assert [entry.token_id for entry in first.tokens] == given
    prefix = decoder_prefix(asked, TOKENIZER, config)
    source, decoder = torch.tensor([asked.encoder_ids]), torch.tensor([prefix])
    ones = torch.ones_like
    scores = model(source, ones(source), decoder, ones(decoder))[0].log_softmax(-1)
    own = len(prefix) - length
    for position, entry in enumerate(first.tokens, own - 1):
        assert entry.logprob == pytest.approx(float(scores[position, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == scores[position].topk(2).indices.tolist()


def test_scores_that_are_not_finite_fail_the_request():
    model = tiny_model(seed=3)
    logits = model.logits
    model.logits = lambda hidden: logits(hidden) * torch.nan
    asked = request("abc", decoder_prompt="x", prompt_logprobs=0)
    with pytest.raises(Exception, match="scores that are not finite"):
        next(generate(model, TOKENIZER, asked))

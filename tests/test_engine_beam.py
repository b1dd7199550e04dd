import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from engine.beam import answer_text, beam_search
from engine.checkpoint_any import load_any
from engine.errors import EngineError, RequestError
from engine.generation import Generation, generate
from engine.prompt import build_request
from engine.request import BeamParams, Piece, Request, SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny T5 of transformers and the same as ours."""
    config = T5Config(
        vocab_size=TOKENIZER.vocab_size,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    oracle = T5ForConditionalGeneration(config).eval()
    oracle.lm_head.weight = torch.nn.Parameter(torch.empty(TOKENIZER.vocab_size, 32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 0.15 if name == "lm_head.weight" else 0.4, generator=generator)
        oracle.lm_head.weight[1] *= 3  # so that some answers end early
    path = tmp_path_factory.mktemp("t5")
    oracle.save_pretrained(path)
    return oracle, load_any(path)


def cut(ids):
    """Up to the end mark, without the padding after it."""
    ids = ids[: ids.index(1) + 1] if 1 in ids else ids
    return tuple(ids)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("stops_early", [False, True])
@pytest.mark.parametrize("num_beams", [1, 2, 4, 7])
def test_equal_to_transformers(pair, num_beams, stops_early, length_penalty):
    oracle, model = pair
    lengths = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(8, 250, (1, 5 + seed), generator=generator)
        request = Request(
            request_id="r",
            encoder_ids=tuple(source[0].tolist()),
            params=SamplingParams(max_tokens=9),
        )
        row = Generation(request, TOKENIZER, model.config)
        banned = (row.ban(torch.zeros(TOKENIZER.vocab_size)) == -math.inf).nonzero().flatten()
        with torch.no_grad():
            expected = oracle.generate(
                input_ids=source,
                attention_mask=torch.ones_like(source),
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=length_penalty,
                early_stopping=stops_early,
                do_sample=False,
                max_new_tokens=9,
                suppress_tokens=banned.tolist(),
                output_scores=True,
                return_dict_in_generate=True,
            )
        params = BeamParams(
            num_beams=num_beams, length_penalty=length_penalty, stops_early=stops_early
        )
        found = beam_search(model, TOKENIZER, request, params)
        wanted = [cut(ids[1:].tolist()) for ids in expected.sequences]
        assert [hypothesis.token_ids for hypothesis in found] == wanted
        if num_beams > 1:
            scores = [hypothesis.score for hypothesis in found]
            assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
        lengths |= {len(ids) for ids in wanted}
    # some ended by themselves; the highest penalty likes only the longest
    assert len(lengths) > 1 or num_beams == 1 or length_penalty == 2.0


def test_the_text_of_an_answer_is_what_a_plain_run_of_its_tokens_gives():
    model = tiny_model(seed=9)
    request = build_request("abc", TOKENIZER, MOE, SamplingParams(max_tokens=12), "r")
    (only,) = beam_search(model, TOKENIZER, request, BeamParams(num_beams=1))
    events = generate(model, TOKENIZER, request)
    expected = "".join(event.text for event in events if isinstance(event, Piece))
    assert answer_text(request, TOKENIZER, MOE, only) == expected != ""


def test_one_beam_is_greedy():
    model = tiny_model(seed=9)
    request = build_request("abc", TOKENIZER, MOE, SamplingParams(max_tokens=12), "r")
    (only,) = beam_search(model, TOKENIZER, request, BeamParams(num_beams=1))
    pieces = [e for e in generate(model, TOKENIZER, request) if isinstance(e, Piece)]
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert only.token_ids == tuple(tokens)


def test_more_beams_find_likelier_answers():
    model = tiny_model(seed=3)
    request = build_request(
        "some text", TOKENIZER, MOE, SamplingParams(max_tokens=8, ignore_eos=True), "r"
    )
    best = [
        beam_search(model, TOKENIZER, request, BeamParams(num_beams=n, length_penalty=0.0))[0].score
        for n in (1, 8)
    ]
    assert best[1] > best[0]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 33}, "num_beams"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": 11.0}, "length_penalty"),
    ],
)
def test_impossible_searches_are_refused(values, field):
    with pytest.raises(RequestError) as caught:
        BeamParams(**values)
    assert caught.value.field == field


def test_blanks_and_broken_models_are_refused():
    model = tiny_model()
    fill = build_request("a <span>", TOKENIZER, MOE, SamplingParams(), "r", fill=True)
    with pytest.raises(RequestError, match="does not fill blanks"):
        beam_search(model, TOKENIZER, fill, BeamParams())
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    request = build_request("a", TOKENIZER, MOE, SamplingParams(), "r")
    with pytest.raises(EngineError, match="not finite"):
        beam_search(model, TOKENIZER, request, BeamParams())

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import PromptTooLong, RequestError
from engine.generation import Generation, generate, require_choice
from engine.prompt import BLANK, build_request, decoder_prefix
from engine.request import Finished, Piece, SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

T5_STYLE = replace(MOE, continuation_sentinel=None)
TOKENIZER = byte_tokenizer()
S = [TOKENIZER.sentinel_id(i) for i in range(4)]
EOS = 1


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def request(prompt="ab", config=MOE, fill=False, **params):
    return build_request(prompt, TOKENIZER, config, SamplingParams(**params), "r", fill=fill)


def test_a_text_to_continue_ends_in_the_sentinel_that_the_decoder_starts_with():
    assert request().encoder_ids == (*ids("ab"), S[0])
    assert decoder_prefix(request(), TOKENIZER, MOE) == [0, S[0]]
    last = replace(MOE, continuation_sentinel=-1)
    assert request(config=last).encoder_ids[-1] == TOKENIZER.sentinel_id(-1)
    assert decoder_prefix(request(config=last), TOKENIZER, last) == [0, TOKENIZER.sentinel_id(-1)]


def test_t5_closes_the_text_and_starts_with_padding():
    asked = request(config=T5_STYLE)
    assert asked.encoder_ids == (*ids("ab"), EOS)
    assert decoder_prefix(asked, TOKENIZER, T5_STYLE) == [0]


def test_blanks_become_sentinels_only_when_filling_is_asked_for():
    asked = request(f"a{BLANK}b{BLANK}", fill=True)
    assert asked.encoder_ids == (*ids("a"), S[0], *ids("b"), S[1])
    assert asked.num_blanks == 2
    assert request(f"a{BLANK}").encoder_ids == (*ids(f"a{BLANK}"), S[0])
    by_ids = request([*ids("a"), S[0]], fill=True)
    assert (by_ids.encoder_ids, by_ids.num_blanks) == ((*ids("a"), S[0]), 1)


@pytest.mark.parametrize(
    ("prompt", "fill", "message"),
    [
        ("", False, "the prompt is empty"),
        ([], False, "the prompt is empty"),
        ([384], False, "token id 384 is outside the vocabulary of 384"),
        ([-1], False, "token id -1 is outside"),
        ("no blank", True, "the prompt holds 0 blanks"),
        (BLANK * 17, True, "the prompt holds 17 blanks; to fill, mark 1 to 16"),
        ([S[1], S[0]], True, "the sentinels among the token ids must be 0, 1, 2"),
        ([S[0], S[0]], True, "the sentinels among the token ids must be 0, 1, 2"),
    ],
)
def test_bad_prompts(prompt, fill, message):
    with pytest.raises(RequestError, match=message) as caught:
        request(prompt, fill=fill)
    assert caught.value.field == "prompt"


def test_a_prompt_that_is_too_long_is_refused_before_it_is_tokenized():
    with pytest.raises(PromptTooLong, match="has 257 tokens; the limit is 256"):
        request("a" * 256)
    with pytest.raises(PromptTooLong, match="1,000,000 characters"):
        request("a" * 1_000_000)


def test_more_tokens_than_a_cache_may_hold_are_refused():
    assert request(max_tokens=256).params.max_tokens == 256
    with pytest.raises(RequestError, match="max_tokens is 257; the limit is 256") as caught:
        request(max_tokens=257)
    assert caught.value.field == "max_tokens"


def pushed(row: Generation, tokens: list[int]) -> list[tuple[int, str]]:
    pieces = [piece for token in tokens for piece in row.push(token)]
    return [(piece.blank, piece.text) for piece in pieces if piece.text]


def test_filling_reads_the_answers_between_the_sentinels():
    row = Generation(request(f"{BLANK} {BLANK}", fill=True), TOKENIZER, MOE)
    assert pushed(row, [*ids("hi"), S[1], *ids("yo")]) == [(0, "h"), (0, "i"), (1, "y"), (1, "o")]
    assert row.finish is None
    row.push(S[2])
    assert row.finish == ("stop", None)


def test_while_filling_only_the_next_sentinel_is_allowed_and_no_answer_is_empty():
    row = Generation(request(f"{BLANK} {BLANK}", fill=True), TOKENIZER, MOE)
    zeros = torch.zeros(MOE.vocab_size)
    assert torch.isinf(row.ban(zeros)[[*S, EOS]]).all()
    row.push(ids("a")[0])
    allowed = [i for i in (*S, EOS) if row.ban(zeros)[i] == 0]
    assert allowed == [S[1]]
    row.push(S[1])
    row.push(ids("a")[0])
    allowed = [i for i in (*S, EOS) if row.ban(zeros)[i] == 0]  # nothing is left to fill
    assert allowed == [S[2], EOS]


def test_the_limit_counts_the_sentinels_between_blanks():
    row = Generation(request(f"{BLANK} {BLANK}", fill=True, max_tokens=2), TOKENIZER, MOE)
    assert pushed(row, [*ids("a"), S[1]]) == [(0, "a")]
    assert row.finish == ("length", None)


def test_a_stop_string_in_a_blank_ends_the_request_and_none_reaches_over_two_blanks():
    asked = request(f"{BLANK} {BLANK}", fill=True, stop=("ab",))
    row = Generation(asked, TOKENIZER, MOE)
    assert pushed(row, [*ids("a"), S[1], *ids("b")]) == [(0, "a"), (1, "b")]
    assert row.finish is None
    row = Generation(asked, TOKENIZER, MOE)
    assert pushed(row, ids("xab")) == [(0, "x")]
    assert row.finish == ("stop", "ab")


def test_half_a_character_at_the_end_of_a_blank_may_complete_a_stop_string():
    asked = request(f"{BLANK} {BLANK}", fill=True, stop=("\ufffd",))
    row = Generation(asked, TOKENIZER, MOE)
    assert pushed(row, [ids("\u4f60")[0], S[1]]) == []
    assert row.finish == ("stop", "\ufffd")


def test_marks_are_never_generated():
    row = Generation(request(), TOKENIZER, MOE)
    banned = torch.isinf(row.ban(torch.zeros(MOE.vocab_size))).nonzero().flatten().tolist()
    assert banned == [0, 2]  # padding and unknown; the end mark may come


def test_ids_that_are_closed_already_are_not_closed_again():
    for config in (MOE, T5_STYLE):
        once = request("ab", config).encoder_ids
        assert request(list(once), config).encoder_ids == once
        assert request(ids("ab"), config).encoder_ids == once


@pytest.mark.parametrize("end", [EOS, S[0], S[1]])
def test_continuing_ends_at_an_end_mark_or_a_sentinel(end):
    row = Generation(request(), TOKENIZER, MOE)
    assert pushed(row, [*ids("hi"), end]) == [(0, "h"), (0, "i")]
    assert row.finish == ("stop", end)


def test_t5_may_print_sentinels_while_continuing():
    row = Generation(request(config=T5_STYLE), TOKENIZER, T5_STYLE)
    row.push(S[0])
    assert row.finish is None


def test_stop_strings_end_the_text_and_are_not_shown():
    row = Generation(request(stop=("lo w",)), TOKENIZER, MOE)
    assert "".join(text for _, text in pushed(row, ids("hello w"))) == "hel"
    assert row.finish == ("stop", "lo w")


def test_half_a_stop_string_is_shown_when_the_text_ends_otherwise():
    row = Generation(request(stop=("lo w",)), TOKENIZER, MOE)
    assert "".join(text for _, text in pushed(row, [*ids("hello"), EOS])) == "hello"


def test_characters_are_never_cut():
    row = Generation(request(max_tokens=4), TOKENIZER, MOE)
    first, *rest = ids("\u4f60")
    assert pushed(row, [first]) == []
    assert pushed(row, rest) == [(0, "\u4f60")]
    assert pushed(row, [first]) == [(0, "\ufffd")]  # the limit ends it in mid-character
    assert row.finish == ("length", None)


def run(model, asked):
    events = list(generate(model, TOKENIZER, asked))
    assert all(isinstance(event, Piece) for event in events[:-1])
    assert isinstance(events[-1], Finished)
    tokens = [token for event in events[:-1] for token in event.token_ids]
    return tokens, "".join(event.text for event in events[:-1]), events[-1]


@torch.no_grad()
def test_greedy_generation_equals_recomputing_everything_for_each_token():
    model = tiny_model(T5_STYLE, seed=4)
    asked = request("some text", T5_STYLE, max_tokens=12)
    tokens, _, _ = run(model, asked)
    source = torch.tensor([asked.encoder_ids])
    target = [0]
    row = Generation(asked, TOKENIZER, T5_STYLE)
    for token in tokens:
        rows = torch.tensor([target])
        logits = model(source, torch.ones_like(source), rows, torch.ones_like(rows))[0, -1]
        assert int(row.ban(logits).argmax()) == token
        target.append(token)
    assert len(tokens) >= 3


def test_penalties_count_what_the_row_holds():
    model = tiny_model(seed=9)

    def tokens(**params):
        return run(model, request("abc", max_tokens=30, **params))[0]

    free = tokens()
    assert (len(free), len(set(free))) == (30, 1)  # this one says the same again and again
    penalized = tokens(repetition_penalty=10.0, presence_penalty=2.0)
    assert len(penalized) == len(set(penalized)) > 1
    assert tokens(logit_bias=((70, 100.0),)) == [70] * 30


def test_only_allowed_tokens_come_and_an_end_only_if_it_is_among_them():
    model = tiny_model(seed=4)
    tokens, _, finished = run(model, request("abc", max_tokens=9, allowed_token_ids=(70, 71)))
    assert set(tokens) <= {70, 71}
    assert (len(tokens), finished.reason) == (9, "length")
    _, _, ended = run(model, request("abc", max_tokens=9, allowed_token_ids=(EOS,)))
    assert (ended.reason, ended.completion_tokens) == ("stop", 1)


def test_nothing_ends_a_text_before_its_least_length_and_never_if_ends_are_ignored():
    model = tiny_model(seed=4)
    _, _, early = run(model, request("abc", max_tokens=9))
    assert (early.reason, early.completion_tokens) == ("stop", 1)
    _, _, later = run(model, request("abc", max_tokens=9, min_tokens=4))
    assert later.completion_tokens > 4 or later.reason == "length"
    tokens, _, never = run(model, request("abc", max_tokens=9, ignore_eos=True))
    assert (never.reason, len(tokens)) == ("length", 9)


def test_stop_ids_end_the_text_like_end_marks():
    model = tiny_model(seed=9)
    (first, *_), _, _ = run(model, request("abc", max_tokens=30))
    tokens, _, finished = run(model, request("abc", max_tokens=30, stop_token_ids=(first,)))
    assert (tokens, finished.reason, finished.stop_reason) == ([], "stop", first)
    tokens, _, _ = run(model, request("abc", max_tokens=30, stop_token_ids=(first,), min_tokens=3))
    assert len(tokens) >= 3
    assert first not in tokens


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_ids_that_the_model_lacks_are_refused(field):
    with pytest.raises(RequestError, match="token id 384 is outside the vocabulary") as caught:
        request("abc", **{field: (384,)})
    assert caught.value.field == field


def test_each_token_tells_its_log_probability_if_asked_the_end_mark_too():
    model = tiny_model(seed=1)
    asked = request("abc", max_tokens=30, logprobs=2)
    events = list(generate(model, TOKENIZER, asked))
    plain = list(generate(model, TOKENIZER, replace(asked, params=SamplingParams(max_tokens=30))))
    told = [entry for e in events[:-1] for entry in e.logprobs]
    assert "".join(e.text for e in events[:-1]) == "".join(e.text for e in plain[:-1])
    assert len(told) == events[-1].completion_tokens
    assert events[-1].reason == "stop"
    target = [*decoder_prefix(asked, TOKENIZER, MOE), *(entry.token_id for entry in told)]
    source = torch.tensor([asked.encoder_ids])
    decoder = torch.tensor([target[:-1]])
    ones = torch.ones_like
    with torch.no_grad():
        scores = model(source, ones(source), decoder, ones(decoder))[0].log_softmax(-1)
    for entry, row in zip(told, scores[-len(told) :], strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(2).indices.tolist()


def test_sampling_repeats_with_its_seed_and_tells_a_seed_it_drew():
    model = tiny_model(seed=4)
    asked = request("some text", max_tokens=16, temperature=1.5)
    tokens, _, finished = run(model, asked)
    again, _, _ = run(
        model, request("some text", max_tokens=16, temperature=1.5, seed=finished.seed)
    )
    assert again == tokens


def test_the_account_of_a_request():
    _, _, finished = run(tiny_model(seed=4), request("abc", max_tokens=5))
    assert finished.prompt_tokens == 4
    assert 1 <= finished.completion_tokens <= 5
    assert finished.encode_s > 0
    assert finished.decode_s > 0


def test_filling_answers_every_blank_or_hits_the_limit():
    model = tiny_model(seed=4)
    seen = set()
    params = {"max_tokens": 40, "temperature": 1.0, "logit_bias": ((S[1], 3.0), (S[2], 3.0))}
    for seed in range(30):
        asked = request(f"a{BLANK}b{BLANK}", fill=True, seed=seed, **params)
        *pieces, finished = generate(model, TOKENIZER, asked)
        seen.add(finished.reason)
        if finished.reason == "stop":
            assert {piece.blank for piece in pieces} == {0, 1}
        else:
            assert finished.completion_tokens == 40
    assert seen == {"stop", "length"}


def ends_of(row):
    """Which of the end mark and the first sentinels may come next."""
    scores = row.ban(torch.zeros(MOE.vocab_size))
    return [i for i in (*S, EOS) if scores[i] == 0]


@pytest.mark.parametrize("config", [MOE, T5_STYLE])
def test_while_filling_the_least_length_is_that_of_the_whole_request(config):
    asked = request(f"{BLANK} {BLANK}", config, fill=True, min_tokens=4)
    row = Generation(asked, TOKENIZER, config)
    row.push(ids("a")[0])
    assert ends_of(row) == [S[1]]  # the next blank may begin
    row.push(S[1])
    row.push(ids("a")[0])
    assert ends_of(row) == []
    row.push(ids("a")[0])
    assert ends_of(row) == [S[2], EOS]


@pytest.mark.parametrize("config", [MOE, T5_STYLE])
def test_while_filling_ends_are_ignored_in_the_last_blank_only(config):
    asked = request(f"{BLANK} {BLANK}", config, fill=True, ignore_eos=True)
    row = Generation(asked, TOKENIZER, config)
    row.push(ids("a")[0])
    assert ends_of(row) == [S[1]]
    row.push(S[1])
    row.push(ids("a")[0])
    assert ends_of(row) == []


@pytest.mark.parametrize(
    ("params", "fill"),
    [
        ({"allowed_token_ids": (0, 2)}, False),  # marks
        ({"allowed_token_ids": (EOS,), "min_tokens": 1}, False),
        ({"allowed_token_ids": (EOS, S[3]), "ignore_eos": True}, False),
        ({"allowed_token_ids": (70,), "stop_token_ids": (70,), "min_tokens": 1}, False),
        ({"allowed_token_ids": (EOS, S[1])}, True),  # no answer is empty
        ({"stop_token_ids": tuple(range(384)), "min_tokens": 1}, False),
    ],
)
def test_parameters_that_ban_every_token_are_refused(params, fill):
    asked = request(f"a{BLANK}", fill=fill, **params)
    field = next(iter(params))
    with pytest.raises(RequestError, match=f"{field} leaves no token that may come") as caught:
        require_choice(asked, TOKENIZER, MOE)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"allowed_token_ids": (EOS,)},
        {"allowed_token_ids": (EOS, 70), "min_tokens": 5, "ignore_eos": True},
        {"stop_token_ids": tuple(range(384))},
    ],
)
def test_parameters_that_leave_a_token_are_taken(params):
    require_choice(request(**params), TOKENIZER, MOE)


def test_a_stop_string_is_shown_if_asked_for_and_nothing_is_held_back():
    row = Generation(request(stop=("lo w", "lo"), include_stop=True), TOKENIZER, MOE)
    assert pushed(row, ids("hello w")) == [(0, letter) for letter in "hello"]
    assert row.finish == ("stop", "lo")
    row = Generation(request(stop=("lo w",), include_stop=True), TOKENIZER, MOE)
    assert "".join(text for _, text in pushed(row, [*ids("hello"), EOS])) == "hello"


def test_the_text_of_a_stop_id_is_shown_if_asked_for_but_no_mark():
    first, *rest = ids("\u4f60")
    for include, text in ((True, "a\u4f60"), (False, "a\ufffd")):
        asked = request(stop_token_ids=(rest[-1], 2, S[1]), include_stop=include)
        row = Generation(asked, TOKENIZER, MOE)
        pieces = [p for token in [*ids("a"), first, *rest] for p in row.push(token)]
        assert "".join(piece.text for piece in pieces) == text
        assert row.finish == ("stop", rest[-1])
        assert (rest[-1] in pieces[-1].token_ids) == include
        for mark in (2, S[1]):
            row = Generation(asked, TOKENIZER, MOE)
            assert row.push(mark) == []
            assert row.finish == ("stop", mark)


def test_a_stop_string_may_end_in_the_text_of_a_stop_id():
    asked = request(stop=("ab",), stop_token_ids=tuple(ids("b")), include_stop=True)
    row = Generation(asked, TOKENIZER, MOE)
    assert "".join(text for _, text in pushed(row, ids("xab"))) == "xab"
    assert row.finish == ("stop", "ab")


DRAW = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from engine.generation import generate
from engine.prompt import build_request
from engine.request import SamplingParams
from tests.tiny import MOE, byte_tokenizer, tiny_model

params = SamplingParams(max_tokens=24, temperature=1.5, top_p=0.9, seed=7, ignore_eos=True)
asked = build_request("abc", byte_tokenizer(), MOE, params, "r")
*pieces, finished = generate(tiny_model(seed=4), byte_tokenizer(), asked)
print([token for piece in pieces for token in piece.token_ids], finished.seed)
"""


def test_a_seed_gives_the_same_draws_in_every_process():
    root = str(Path(__file__).parents[1])
    told = []
    for salt in ("1", "2"):
        command = [sys.executable, "-c", DRAW, root]
        environment = os.environ | {"PYTHONHASHSEED": salt}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.append(child.stdout.strip())
    asked = request("abc", max_tokens=24, temperature=1.5, top_p=0.9, seed=7, ignore_eos=True)
    tokens, _, finished = run(tiny_model(seed=4), asked)
    assert told == [f"{tokens} {finished.seed}"] * 2
    assert len(set(tokens)) > 3

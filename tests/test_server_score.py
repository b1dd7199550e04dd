"""POST /v1/score: continuations of contexts, and that the numbers are the engine's own."""

import math

import pytest
from starlette.testclient import TestClient

from engine.prompt import build_request
from engine.request import Continuations, Failed, SamplingParams, Score, Scored, TokenLogprob
from engine.scoring import make_question, score
from server.app import create_app
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from server.settings import Settings
from tests.fakes import FakeEngine, finished, tiny_worker
from tests.test_server_completions import error_of, usage_of
from tests.tiny import MOE, byte_tokenizer, tiny_model

URL = "/v1/score"


def scoring(request):
    scores = tuple(
        Score(
            tuple(-float(i) for i in ids),
            ids == (70, 71),
            tuple(TokenLogprob(i, -float(i), ((9, -math.inf),)) for i in ids)
            if request.task.top
            else (),
        )
        for ids in request.task.choices
    )
    return [Scored(scores), finished(request, "stop", 0)]


def post(engine, body, **settings):
    app = create_app(engine, Settings(**settings))
    return TestClient(app, raise_server_exceptions=False).post(URL, json=body)


def test_scores_of_all_continuations_after_all_contexts():
    engine = FakeEngine(scoring)
    body = {"contexts": ["a", "bc"], "continuations": [[70, 71], "x"], "model": "org/tiny"}
    reply = post(engine, {**body, "decoder_prompt": "y"}).json()
    tasks = {request.task for request in engine.submitted}
    assert tasks == {Continuations(choices=((70, 71), (123,)), top=0)}
    assert [request.decoder_ids for request in engine.submitted] == [(124,)] * 2
    assert [context["index"] for context in reply["data"]] == [0, 1]
    first, second = reply["data"][0]["scores"]
    assert first == {
        "index": 0,
        "logprob": -141.0,
        "is_greedy": True,
        "token_ids": [70, 71],
        "tokens": ["C", "D"],
        "token_logprobs": [-70.0, -71.0],
        "top_logprobs": None,
    }
    assert (second["token_ids"], second["is_greedy"]) == ([123], False)
    # after each context the decoder reads what it said before and a continuation, one by one
    assert reply["usage"] == usage_of(5, 0, decoder=2 * (3 + 2))
    assert (reply["object"], reply["model"]) == ("score", "org/tiny")
    assert reply["id"].startswith("score-")


def test_one_context_with_the_likeliest_tokens():
    engine = FakeEngine(scoring)
    body = {"context": [5, 6], "continuations": ["x"], "logprobs": 1, "add_special_tokens": False}
    reply = post(engine, body).json()
    assert engine.submitted[0].encoder_ids == (5, 6)
    assert engine.submitted[0].task.top == 1
    assert reply["data"][0]["scores"][0]["top_logprobs"] == [[[9, -9999.0]]]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "context"),
        ({"context": "a", "contexts": ["a"]}, "context"),
        ({"contexts": []}, "contexts"),
        ({"contexts": ["a"] * 65}, "contexts"),
        ({"context": ""}, "context"),
        ({"context": "a", "continuations": []}, "continuations"),
        ({"context": "a", "continuations": [""]}, "continuations"),
        ({"context": "a", "continuations": [[]]}, "continuations"),
        ({"context": "a", "continuations": [[384]]}, "continuations"),
        ({"context": "a", "continuations": ["x"] * 257}, "continuations"),
        ({"context": "a", "continuations": ["x" * 3000]}, "continuations"),
        ({"context": "a", "continuations": "x"}, "continuations"),
        ({"context": "a", "logprobs": 21}, "logprobs"),
        ({"context": "a", "decoder_prompt": [384]}, "decoder_prompt"),
        ({"context": "a", "model": "other"}, "model"),
    ],
)
def test_what_is_refused(body, field):
    engine = FakeEngine(scoring)
    response = post(engine, {"continuations": ["x"], **body})
    assert error_of(response, 404 if field == "model" else 400)["param"] == field
    assert engine.submitted == []


def test_continuations_too_long_in_all():
    body = {"context": "a", "continuations": ["x" * 60, "y" * 60]}
    error = error_of(post(FakeEngine(scoring), body, max_prompt_chars=100), 400)
    assert error["param"] == "continuations"


@pytest.mark.parametrize("script", [lambda r: [Failed("no")], lambda r: [finished(r)]])
def test_engine_that_gives_up(script):
    body = {"context": "a", "continuations": ["x"]}
    assert error_of(post(FakeEngine(script), body), 500)["code"] == "engine_failure"


def test_full_queue():
    response = post(FakeEngine(scoring, room=0), {"context": "a", "continuations": ["x"]})
    assert error_of(response, 429)["code"] == "server_overloaded"


def test_the_numbers_are_those_of_the_engine():
    model, tokenizer = tiny_model(), byte_tokenizer()
    texts, choices = ["hello", "no"], ["ab", "abc", "z"]
    with tiny_worker() as worker:
        client = TestClient(create_app(worker, Settings()))
        body = {"contexts": texts, "continuations": choices, "logprobs": 2}
        reply = client.post(URL, json=body).json()
        generated = client.post(
            "/v1/completions",
            json={
                "prompt": texts,
                "decoder_prompt": "ab",
                "echo": True,
                "logprobs": 1,
                "max_tokens": 1,
            },
        ).json()
    for text, found, echoed in zip(texts, reply["data"], generated["choices"], strict=True):
        request = build_request(text, tokenizer, MOE, SamplingParams(), "r")
        ids = [tokenizer.encode(choice) for choice in choices]
        (wanted,) = score(model, tokenizer, [make_question(request, ids, tokenizer)])
        for told, one in zip(found["scores"], wanted, strict=True):
            assert told["token_logprobs"] == pytest.approx(one.logprobs, abs=1e-4)
            assert told["is_greedy"] == one.is_greedy
            assert len(told["top_logprobs"][0]) == 2
        # the same tokens by way of echo
        begin = echoed["logprobs"]["token_logprobs"][:2]
        assert begin == pytest.approx(wanted[0].logprobs, abs=1e-4)
        assert echoed["text"].startswith("ab")


def test_what_is_read_is_on_the_bill(tmp_path):
    record = KeyRecord(name="alice", sha256=hash_key("key"), tokens_per_minute=20)
    write_keys(tmp_path / "keys", [record])
    app = create_app(FakeEngine(scoring), Settings(keys_file=tmp_path / "keys"))
    client = TestClient(app, headers={"authorization": "Bearer key"})
    body = {"context": "abc", "continuations": ["xy", "z"], "decoder_prompt": "d"}
    read = 4 + (1 + 2) + (1 + 1)  # with the end mark; the decoder reads its prompt twice
    assert client.post(URL, json=body).status_code == 200
    (row,) = client.get("/v1/usage").json()["data"]
    assert row["prompt_tokens"] == read
    assert client.post(URL, json=body).status_code == 200
    refused = client.post(URL, json=body)
    assert error_of(refused, 429)["code"] == "rate_limit_exceeded"

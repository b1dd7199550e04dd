"""POST /v1/generate: our own names for the same; and all text routes on the real engine."""

import json
import socket
import threading

import httpx2
import pytest
from starlette.testclient import TestClient

from engine.request import Piece, PromptLogprobs, TokenLogprob
from server.app import create_app
from server.settings import Settings
from tests.fakes import FakeEngine, finished, live_server, tiny_worker
from tests.test_server_completions import error_of, events_of, usage_of
from tests.tiny import tiny_model
from tests.waiting import wait_for

URL = "/v1/generate"


def post(engine, body, url=URL, **settings):
    app = create_app(engine, Settings(**settings))
    return TestClient(app, raise_server_exceptions=False).post(url, json=body)


def writing(request):
    told = []
    if request.params.prompt_logprobs is not None:
        told = [PromptLogprobs(tuple(TokenLogprob(i, -0.5, ()) for i in request.decoder_ids))]
    token = TokenLogprob(70, -1.0, ((70, -1.0),))
    logprobs = (token,) if request.params.logprobs is not None else ()
    return [*told, Piece("C", (70,), logprobs=logprobs), finished(request, "length", 1)]


def test_reply():
    engine = FakeEngine(writing)
    body = {"text": "a", "decoder_prompt": "x", "logprobs": 1, "prompt_logprobs": 0}
    reply = post(engine, {**body, "return_token_ids": True, "seed": 3}).json()
    assert (reply["object"], reply["id"][:4]) == ("generation", "gen-")
    (answer,) = reply["answers"]
    assert answer == {
        "index": 0,
        "text": "C",
        "token_ids": [70],
        "spans": None,
        "tokens": [{"id": 70, "token": "C", "logprob": -1.0, "top": [[70, -1.0]]}],
        "decoder_tokens": [{"id": 123, "token": "x", "logprob": -0.5, "top": []}],
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 3,
        "score": None,
        "encoder_token_ids": list(engine.submitted[0].encoder_ids),
        "decoder_prompt_token_ids": [123],
    }
    assert reply["usage"] == usage_of(2, 1, decoder=1)
    assert engine.submitted[0].params.max_tokens == 64


def test_stream():
    options = {"include_usage": True}
    body = {"text": ["a", "b"], "stream": True, "stream_options": options}
    *chunks, last = events_of(post(FakeEngine(writing), body).text)
    texts = ["", ""]
    for chunk in chunks:
        (answer,) = chunk["answers"]
        texts[answer["index"]] += answer["text"]
    assert texts == ["C", "C"]
    assert last["answers"] == []
    assert last["usage"] == usage_of(4, 2)


def test_spans():
    engine = FakeEngine(lambda request: [Piece("x", (70,), 0), finished(request)])
    (answer,) = post(engine, {"text": "a<span>b", "fill": True}).json()["answers"]
    assert answer["spans"] == ["x"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": []}, "text"),
        ({"text": "a", "max_tokens": 0}, "max_tokens"),
        ({"text": "a", "decoder_prompt": [384]}, "decoder_prompt"),
    ],
)
def test_what_is_refused(body, field):
    assert error_of(post(FakeEngine(), body), 400)["param"] == field


@pytest.fixture(scope="module")
def real():
    with tiny_worker() as worker:
        yield TestClient(create_app(worker, Settings()), raise_server_exceptions=False)


def test_all_routes_give_the_same_text(real):
    sampling = {"max_tokens": 8, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    plain = real.post("/v1/completions", json={"prompt": "hello", **sampling}).json()
    native = real.post(URL, json={"text": "hello", **sampling}).json()
    messages = [{"role": "user", "content": "hello"}]
    chat = real.post("/v1/chat/completions", json={"messages": messages, **sampling}).json()
    streamed = real.post(URL, json={"text": "hello", **sampling, "stream": True})
    text = plain["choices"][0]["text"]
    assert native["answers"][0]["text"] == text
    assert chat["choices"][0]["message"]["content"] == text
    told = [event["answers"][0]["text"] for event in events_of(streamed.text)]
    assert "".join(told) == text
    assert plain["usage"]["completion_tokens"] == 8


def test_what_is_given_and_what_comes_of_itself_go_on_alike(real):
    body = {"text": "hello", "temperature": 0, "ignore_eos": True, "max_tokens": 6}
    (whole,) = real.post(URL, json=body).json()["answers"]
    given = whole["token_ids"][:2]
    body |= {"decoder_prompt": given, "max_tokens": 4, "echo": True, "logprobs": 0}
    (rest,) = real.post(URL, json=body).json()["answers"]
    assert given + rest["token_ids"] == whole["token_ids"]
    assert [token["id"] for token in rest["tokens"]] == whole["token_ids"]


def test_an_evaluation_harness_gets_an_entry_for_each_token(real):
    ids = [[70, 71, 72, 73], [80, 81]]
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choices = real.post("/v1/completions", json={**body, "seed": 1234}).json()["choices"]
    for prompt, choice in zip(ids, choices, strict=True):
        told = choice["logprobs"]
        assert [len(values) for values in told.values()] == [len(prompt) + 1] * 4
        assert all(value < 0 for value in told["token_logprobs"])
        pairs = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
        assert all(top[name] == value <= max(top.values()) for name, value, top in pairs)


def test_beams_and_best_of(real):
    body = {"prompt": "hello", "max_tokens": 4}
    beams = {**body, "use_beam_search": True, "num_beams": 3, "n": 2}
    choices = real.post("/v1/completions", json=beams).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["score"] >= choices[1]["score"]
    ranked = {**body, "n": 2, "best_of": 4, "seed": 1, "logprobs": 0, "ignore_eos": True}
    choices = real.post("/v1/completions", json=ranked).json()["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) for c in choices]
    assert means[0] >= means[1]


def test_answers_follow_grammars(real):
    body = {"prompt": "x", "max_tokens": 30, "structured_outputs": {"choice": ["yes", "no"]}}
    assert real.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    chat = {"messages": [{"role": "user", "content": "x"}], "response_format": form}
    reply = real.post("/v1/chat/completions", json={**chat, "max_tokens": 40}).json()
    assert json.loads(reply["choices"][0]["message"]["content"])["a"] in (1, 2)


def test_deadline_of_a_running_answer(real):
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "timeout": 0.0001}
    response = real.post("/v1/completions", json=body)
    assert error_of(response, 504)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("url", ["/v1/completions", URL, "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(url, stream):
    prompt = {"prompt": "a", "text": "a", "messages": [{"role": "user", "content": "a"}]}
    options = {"max_tokens": 250, "ignore_eos": True, "stream": stream, "n": 8}
    body = json.dumps({**prompt, **options}).encode()
    head = f"POST {url} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    model, begun, go_on = tiny_model(), threading.Event(), threading.Event()
    step = model.step

    def held_up(tokens, cache):
        begun.set()
        assert go_on.wait(300)
        return step(tokens, cache)

    model.step = held_up
    with tiny_worker(model) as worker, live_server(worker) as address:
        try:
            place = httpx2.URL(address)
            with socket.create_connection((place.host, place.port), timeout=300) as client:
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert begun.wait(300)
            wait_for(lambda: worker.stats().cancelled == 8)
        finally:
            go_on.set()
        wait_for(lambda: not worker.stats().running)
        stats = worker.stats()
        assert (stats.running, stats.queued) == (0, 0)
        assert stats.requests == 0  # none was carried to its end

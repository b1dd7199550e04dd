"""POST /v1/completions: fields, choices, streams, failures, clients that leave."""

import asyncio
import hashlib
import json
import math
import socket
import threading
from dataclasses import replace

import httpx2
import openai
import pytest
from fastapi import Request as HttpRequest
from starlette.testclient import TestClient

from engine.errors import EngineStopped
from engine.request import (
    Answer,
    BeamParams,
    Failed,
    Piece,
    PromptLogprobs,
    Request,
    Searched,
    TokenLogprob,
)
from engine.tokenizer import ByteTokenizer
from offload.pipeline import PipelineStats
from server.app import create_app
from server.gateway import LONG_BODY_BYTES, Gateway
from server.jobs import MANY_SPOTS
from server.logprobs import TokenNames, tell_logprobs
from server.metrics import Metrics
from server.orders import encode_end
from server.parts import Spot
from server.replies import Transcript
from server.schemas import MAX_FIELDS, MAX_PROMPTS
from server.schemas_completions import OPENAI_MAX_TOKENS, CompletionRequest
from server.settings import Settings
from tests.fakes import FAKE_BASE, HOLD, FakeEngine, finished, hello, live_server
from tests.waiting import wait_for

URL = "/v1/completions"


def client_of(engine, **settings):
    return TestClient(create_app(engine, Settings(**settings)), raise_server_exceptions=False)


def post(engine, body, **settings):
    return client_of(engine, **settings).post(URL, json=body)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


def usage_of(encoder, generated, decoder=0):
    details = {"encoder_tokens": encoder, "decoder_prompt_tokens": decoder, "cached_tokens": 0}
    return {
        "prompt_tokens": encoder + decoder,
        "completion_tokens": generated,
        "total_tokens": encoder + decoder + generated,
        "prompt_tokens_details": details,
    }


def events_of(text):
    """The JSON objects of a stream; checks framing and the end mark."""
    assert "\r" not in text
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_reply_has_the_shape_of_openai():
    engine = FakeEngine()
    response = post(engine, {"model": "org/tiny", "prompt": "ab", "seed": 5})
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "org/tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "seed": 5,
            "score": None,
            "spans": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "decoder_prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]
    assert body["usage"] == usage_of(3, 2)
    assert body["system_fingerprint"].startswith("fp_")
    assert body["timings"]["encode_ms"] == 0
    assert body["timings"]["expert_hits"] is None
    assert "x-ignored-fields" not in response.headers


def test_defaults_are_those_of_openai():
    engine = FakeEngine()
    post(engine, {"prompt": "ab"})
    params = engine.submitted[0].params
    assert params.max_tokens == OPENAI_MAX_TOKENS
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert (params.seed, params.stop) == (None, ())


def test_parameters_reach_the_engine():
    engine = FakeEngine()
    given = {"max_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": -4}
    given |= {"min_tokens": 2, "ignore_eos": True, "logprobs": 3}
    given |= {"min_p": 0.25, "typical_p": 0.5, "repetition_penalty": 1.5}
    given |= {"presence_penalty": -1, "frequency_penalty": 2}
    biases = {"7": -100, "19": 2.5}
    post(engine, {"prompt": "ab", "stop": ["x", "yy"], "logit_bias": biases, **given})
    params = engine.submitted[0].params
    assert {name: getattr(params, name) for name in given} == given
    assert params.stop == ("x", "yy")
    assert params.logit_bias == ((7, -100.0), (19, 2.5))


def test_one_stop_text_and_top_k_off():
    engine = FakeEngine()
    post(engine, {"prompt": "ab", "stop": "x", "top_k": -1})
    assert engine.submitted[0].params.stop == ("x",)
    assert engine.submitted[0].params.top_k == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [[100]]),
        (["a", "b"], [[100], [101]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_forms_of_a_prompt(prompt, expected):
    engine = FakeEngine()
    response = post(engine, {"prompt": prompt})
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))
    sentinel = engine.tokenizer.sentinel_id(0)
    assert [list(r.encoder_ids) for r in engine.submitted] == [[*ids, sentinel] for ids in expected]


def test_samples_of_several_prompts_are_ordered_and_seeded():
    engine = FakeEngine()
    body = post(engine, {"prompt": ["a", "bcd"], "n": 2, "seed": 10}).json()
    assert [len(r.encoder_ids) for r in engine.submitted] == [2, 2, 4, 4]
    assert [choice["seed"] for choice in body["choices"]] == [10, 11, 10, 11]
    assert len({r.request_id for r in engine.submitted}) == 4
    # the tokens of a prompt count once, however many samples it has
    assert body["usage"] == usage_of(6, 8)


@pytest.mark.parametrize("name", CompletionRequest.model_fields)
def test_null_means_absent(name):
    response = post(FakeEngine(), {"prompt": "ab"} | {name: None})
    if name == "prompt":
        assert error_of(response, 400)["param"] == "prompt"
    else:
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("prompt", value) for value in (1, True, {}, [], ["a", 1], [1, "a"], [[1], 2], [True])),
        *(("prompt", value) for value in ([-1], [1.5], [2**40], ["\ud800"], "a\udc00", "", [[]])),
        ("prompt", [383, 384]),
        *(("max_tokens", value) for value in (0, -1, 2049, 2**31, 2**70, "1", True, 1.5, 1e308)),
        *(("temperature", value) for value in (-0.1, 2.1, "1", True)),
        *(("top_p", value) for value in (0, 1.1, "1")),
        *(("top_k", value) for value in (-2, 2**31, 1.0)),
        *(("logprobs", value) for value in (-1, 21, True, "1")),
        *(("min_tokens", value) for value in (-1, 17)),
        *(("stop_token_ids", value) for value in ([384], [-1], 5)),
        ("allowed_token_ids", ["a"]),
        ("ignore_eos", 1),
        *(("min_p", value) for value in (-0.1, 1.1, "0")),
        *(("typical_p", value) for value in (0, 1.1)),
        *(("repetition_penalty", value) for value in (0, -1, 1e-50, 11)),
        *(("presence_penalty", value) for value in (-2.1, 2.1)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1)),
        *(("logit_bias", value) for value in ([], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "1"})),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("logit_bias", {"384": 1}),
        *(("n", value) for value in (0, -1, 65, 10**9, 10**30)),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "1")),
        *(("stop", value) for value in ("", [""], 1, ["a"] * 17, ["a", 1], "x" * 1001)),
        *(("stream", value) for value in (1, "true")),
        *(("fill", value) for value in (1, "yes")),
        ("stream_options", {"include_usage": True}),
        ("stream_options", []),
        ("model", 5),
    ],
)
def test_values_that_are_not_allowed(field, value):
    engine = FakeEngine()
    content = json.dumps({"prompt": "ab"} | {field: value})
    response = client_of(engine).post(
        URL, content=content, headers={"content-type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300
    assert engine.submitted == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "max_tokens"])
def test_numbers_that_are_none(field, number):
    content = f'{{"prompt": "ab", "{field}": {number}}}'
    response = client_of(FakeEngine()).post(
        URL, content=content, headers={"content-type": "application/json"}
    )
    assert error_of(response, 400)["param"] == field


def test_missing_prompt():
    assert error_of(post(FakeEngine(), {}), 400)["param"] == "prompt"


def test_more_choices_than_allowed():
    error = error_of(post(FakeEngine(), {"prompt": ["a"] * 3, "n": 2}, max_choices=5), 400)
    assert error["param"] == "n"
    error = error_of(post(FakeEngine(), {"prompt": ["a"] * 6}, max_choices=5), 400)
    assert error["param"] == "prompt"


def test_seed_of_a_later_sample_out_of_range():
    error = error_of(post(FakeEngine(), {"prompt": "a", "n": 2, "seed": 2**63 - 1}), 400)
    assert error["param"] == "seed"


def test_prompt_too_long():
    error = error_of(post(FakeEngine(), {"prompt": "a" * 3000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"


def test_unknown_model():
    error = error_of(post(FakeEngine(), {"model": "gpt", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


def test_best_of_may_equal_n():
    assert post(FakeEngine(), {"prompt": "a", "n": 2, "best_of": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_named(stream):
    options = {"stream": True, "stream_options": {"x_usage": True}}
    body = {"prompt": "a", "temprature": 1, "\u00fc,\r\n": 2, **(options if stream else {})}
    response = post(FakeEngine(), body)
    assert response.status_code == 200
    names = response.headers["x-ignored-fields"].split(",")
    assert names[:2] == ["temprature", "%C3%BC%2C%0D%0A"]
    assert names[2:] == (["stream_options.x_usage"] if stream else [])


def test_field_names_with_half_characters():
    content = '{"prompt": "a", "\\ud800": 1}'
    headers = {"content-type": "application/json"}
    response = client_of(FakeEngine()).post(URL, content=content, headers=headers)
    assert error_of(response, 400)["message"].endswith("in valid Unicode")


def test_many_unknown_fields_make_a_short_header():
    response = post(FakeEngine(), {"prompt": "a"} | {f"{'x' * 100}{i}": 1 for i in range(150)})
    assert len(response.headers["x-ignored-fields"]) < 2000


def test_stream():
    body = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    response = post(FakeEngine(), body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, last = events_of(response.text)
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in [*chunks, last]}) == 1
    texts, ends = ["", ""], [None, None]
    for chunk in chunks:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == ["Hello", "Hello"]
    assert ends == ["stop", "stop"]
    assert last["choices"] == []
    assert last["usage"] == usage_of(4, 4)


def with_logprobs(request):
    asked = request.params.logprobs
    first = TokenLogprob(6 + 72, -0.5, ((6 + 72, -0.5), (6 + 73, -1.0))[:asked])
    second = TokenLogprob(6 + 101, -math.inf, ((6 + 72, -0.25),)[:asked])
    last = TokenLogprob(1, -3.0, ())
    return [
        Piece("H", (6 + 72,), logprobs=(first,)),
        Piece("e", (6 + 101,), logprobs=(second,)),
        Piece("", (), logprobs=(last,)),
        finished(request),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream):
    name = ByteTokenizer().decode
    body = {"prompt": "ab", "logprobs": 2, "stream": stream}
    response = post(FakeEngine(with_logprobs), body)
    if stream:
        told = [event["choices"][0]["logprobs"] for event in events_of(response.text)]
        assert told.pop() is None
        joined = {key: [item for part in told for item in part[key]] for key in told[0]}
    else:
        joined = response.json()["choices"][0]["logprobs"]
    h, i, e = name([78]), name([79]), name([107])
    assert joined == {
        "tokens": [h, e, "token_id:1"],
        "token_logprobs": [-0.5, -9999.0, -3.0],
        "top_logprobs": [{h: -0.5, i: -1.0}, {h: -0.25, e: -9999.0}, {"token_id:1": -3.0}],
        "text_offset": [0, 1, 2],
    }


def test_logprobs_by_token_id_and_of_the_chosen_alone():
    body = {"prompt": "ab", "logprobs": 0, "return_tokens_as_token_ids": True}
    told = post(FakeEngine(with_logprobs), body).json()["choices"][0]["logprobs"]
    assert told["tokens"] == ["token_id:78", "token_id:107", "token_id:1"]
    assert told["top_logprobs"][0] == {"token_id:78": -0.5}


def test_the_likelier_of_two_tokens_of_one_name_is_told():
    class SameNames(TokenNames):
        def name(self, token_id):
            return "same"

    entry = TokenLogprob(1, -2.0, ((2, -0.5), (3, -1.0)))
    told = tell_logprobs([Spot(entry, 0)], SameNames(ByteTokenizer()))
    assert told.top_logprobs == [{"same": -0.5}]
    assert told.token_logprobs == [-2.0]


def test_timings_tell_what_offloading_cost_over_all_choices(caplog):
    def script(request):
        moved = PipelineStats(
            hits=3, misses=2, host_loads=1, read_bytes=40, copied_bytes=2, stall_s=0.25
        )
        end = replace(finished(request), queued_s=0.5, encode_s=1.0, decode_s=2.0, experts=moved)
        return [Piece("a", (1,)), end]

    with caplog.at_level("INFO"):
        body = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events_of(post(FakeEngine(script), body).text)
    assert all(chunk["timings"] is None for chunk in chunks)
    assert last["timings"] == {
        "queued_ms": 500,
        "encode_ms": 2000,
        "decode_ms": 4000,
        "expert_hits": 6,
        "expert_misses": 4,
        "expert_bytes": 84,
        "expert_stall_ms": 500,
    }
    assert "expert_misses=4" in caplog.text


def test_stream_without_usage():
    events = events_of(post(FakeEngine(), {"prompt": "a", "stream": True}).text)
    assert [len(event["choices"]) for event in events] == [1, 1, 1]


def test_line_breaks_and_foreign_letters_survive_the_stream():
    text = "\u4e2d\u6587\r\n\n\u2028 \U0001f600"
    engine = FakeEngine(lambda request: [Piece(text, (1,)), finished(request)])
    events = events_of(post(engine, {"prompt": "a", "stream": True}).text)
    assert events[0]["choices"][0]["text"] == text


def fill_script(request):
    pieces = [Piece("x", (1,), 0), Piece("y", (2,), 0), Piece("z", (3,), 2)]
    return [*pieces, finished(request, "length", 3)]


def test_fill():
    engine = FakeEngine(fill_script)
    body = post(engine, {"prompt": "a<span>b<span>c<span><span>", "fill": True}).json()
    assert engine.submitted[0].num_blanks == 4
    (choice,) = body["choices"]
    assert choice["spans"] == ["xy", "", "z", ""]
    assert choice["text"] == "xy\n\nz\n"
    assert choice["finish_reason"] == "length"


def test_fill_in_a_stream_adds_up_to_the_same_text():
    engine = FakeEngine(fill_script)
    response = post(engine, {"prompt": "<span><span><span><span>", "fill": True, "stream": True})
    choices = [event["choices"][0] for event in events_of(response.text)]
    assert "".join(choice["text"] for choice in choices) == "xy\n\nz\n"
    assert [choice["spans"] for choice in choices] == [None] * 3 + [["xy", "", "z", ""]]


def test_fill_without_blanks():
    assert error_of(post(FakeEngine(), {"prompt": "a", "fill": True}), 400)["param"] == "prompt"


@pytest.mark.parametrize("blanks", [[], [0], [1], [0, 0, 3], [2, 4], [4]])
def test_transcript_pieces_add_up(blanks):
    transcript = Transcript(num_blanks=5)
    pieces = [Piece(f"p{i}", (1,), blank) for i, blank in enumerate(blanks)]
    text = "".join(transcript.add(piece)[0] for piece in pieces)
    text += transcript.close(finished(Request(request_id="r", encoder_ids=())))
    assert text == "\n".join(transcript.spans)
    assert len(transcript.spans) == 5


@pytest.mark.parametrize(
    "script",
    [
        lambda request: [Piece("a", (1,)), Failed("out of memory")],
        lambda request: [Piece("a", (1,)), finished(request, "cancelled")],
        lambda request: [Piece("a", (1,)), EngineStopped("/secret/path")],
        lambda request: [Piece("a", (1,)), RuntimeError("/secret/path")],
        lambda request: [Piece("a", (1,))],
    ],
)
def test_engine_that_gives_up(script):
    response = post(FakeEngine(script), {"prompt": "a"})
    assert response.status_code in (500, 503)
    error = error_of(response, response.status_code)
    assert error["type"] == "server_error"
    assert "secret" not in response.text

    engine = FakeEngine(script)
    response = post(engine, {"prompt": "a", "stream": True})
    first, last = events_of(response.text)
    assert first["choices"][0]["text"] == "a"
    assert last == {"error": error}
    assert engine.stats().running == 0


def test_message_of_a_failure_is_told():
    engine = FakeEngine(lambda request: [Failed("out of memory")])
    assert error_of(post(engine, {"prompt": "a"}), 500)["message"] == "out of memory"


def test_full_queue_refuses_before_a_text_is_read():
    engine = FakeEngine(room=1)
    engine.tokenizer = None  # would fail
    response = post(engine, {"prompt": ["a", "b"]})
    assert error_of(response, 429)["code"] == "server_overloaded"
    assert engine.submitted == []


def test_full_queue_refuses_all_choices_or_none():
    class Crowded(FakeEngine):
        def require_room(self, num_requests, num_tokens=0, key=""):
            """Others come between the question and the requests."""

    engine = Crowded(room=1)
    response = post(engine, {"prompt": ["a", "b"]})
    error = error_of(response, 429)
    assert error["type"] == "rate_limit_error"
    assert error["code"] == "server_overloaded"
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2500"
    assert engine.stats().running == 0
    assert len(engine.cancelled) == 1


def held(request):
    return [Piece("a", (1,)), HOLD, finished(request)]


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_cancels_its_requests(stream):
    engine = FakeEngine(held)
    body = json.dumps({"prompt": ["a", "b"], "stream": stream}).encode()
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with live_server(engine) as address:
        url = httpx2.URL(address)
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(head.encode() + body)
            assert engine.held.wait(300)
        assert engine.idle.wait(300)
        assert sorted(engine.cancelled) == sorted(r.request_id for r in engine.submitted)
        told = f'infmoe_requests_total{{route="{URL}",status="499"}} 1.0'
        wait_for(lambda: told in httpx2.get(f"{address}/metrics", timeout=300).text)


def test_silence_is_filled_with_comments():
    engine = FakeEngine(held)
    with (
        live_server(engine, keep_alive_s=0.02) as address,
        httpx2.stream(
            "POST", address + URL, json={"prompt": "a", "stream": True}, timeout=300
        ) as response,
    ):
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": keep-alive"
        engine.release()
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def sdk():
    engine = FakeEngine(hello)
    with (
        live_server(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_openai_client(sdk):
    reply = sdk.completions.create(model="org/tiny", prompt="a", max_tokens=5)
    assert reply.choices[0].text == "Hello"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == 4
    assert reply._request_id.startswith("req-")


def test_openai_client_stream(sdk):
    options = {"include_usage": True}
    with sdk.completions.create(
        model="org/tiny", prompt="a", stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == "Hello"
    assert chunks[-1].usage.completion_tokens == 2


def test_openai_client_extension(sdk):
    reply = sdk.completions.create(
        model="org/tiny", prompt="a<span>", extra_body={"fill": True, "top_k": 5}
    )
    assert reply.choices[0].spans == ["Hello"]


def test_openai_client_errors(sdk):
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.completions.create(model="org/tiny", prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    assert [model.id for model in sdk.models.list()] == ["org/tiny"]
    assert sdk.models.retrieve("org/tiny").id == "org/tiny"


def test_openai_client_failure_in_a_stream():
    engine = FakeEngine(lambda request: [Piece("a", (1,)), Failed("out of memory")])
    with (
        live_server(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(model="org/tiny", prompt="a", stream=True) as stream,
        pytest.raises(openai.APIError, match="out of memory"),
    ):
        list(stream)


def test_what_a_shutdown_cut_short_may_be_tried_again():
    engine = FakeEngine(lambda request: [Failed("the server stopped", is_shutdown=True)])
    response = post(engine, {"prompt": "a"})
    error = error_of(response, 503)
    assert (error["code"], error["message"]) == ("shutting_down", "the server stopped")
    assert int(response.headers["retry-after"]) >= 1
    (last,) = events_of(post(engine, {"prompt": "a", "stream": True}).text)
    assert last == {"error": error}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"allowed_token_ids": [0]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "ignore_eos": True}, "allowed_token_ids"),
        ({"stop_token_ids": list(range(384)), "min_tokens": 1}, "stop_token_ids"),
    ],
)
def test_parameters_that_ban_every_token(body, field):
    engine = FakeEngine()
    error = error_of(post(engine, {"prompt": "a", **body}), 400)
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert "leaves no token" in error["message"]
    assert engine.submitted == []


def test_samples_share_their_lists_and_no_id_is_kept_twice():
    engine = FakeEngine()
    post(engine, {"prompt": "a", "n": 3, "seed": 1, "stop_token_ids": [7, 8, 7] * 1000})
    kept = [request.params.stop_token_ids for request in engine.submitted]
    assert kept[0] == (7, 8)
    assert kept[1] is kept[2] is kept[0]


@pytest.mark.parametrize("prompt", ["a", [5]])
def test_prompts_that_nobody_will_count(prompt):
    error = error_of(post(FakeEngine(), {"prompt": [prompt] * (MAX_PROMPTS + 1)}), 400)
    assert error["param"] == "prompt"
    assert f"of prompts up to {MAX_PROMPTS}" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_later_blank_begin_after_the_break(stream):
    def script(request):
        a, b = (Piece(c, (70,), i, (TokenLogprob(70, -1.0, ()),)) for i, c in enumerate("ab"))
        return [a, b, finished(request)]

    body = {"prompt": "<span> <span>", "fill": True, "logprobs": 0, "stream": stream}
    response = post(FakeEngine(script), body)
    if stream:
        told = [event["choices"][0]["logprobs"] for event in events_of(response.text)[:2]]
        assert [offset for part in told for offset in part["text_offset"]] == [0, 2]
    else:
        (choice,) = response.json()["choices"]
        assert choice["text"] == "a\nb"
        assert choice["logprobs"]["text_offset"] == [0, 2]


def echoing(request):
    """As the engine: log-probabilities of the decoder prompt first, where they were asked for."""
    told = []
    if request.params.prompt_logprobs is not None:
        top = ((9, -0.25),) if request.params.prompt_logprobs else ()
        tokens = tuple(TokenLogprob(i, -0.5, top) for i in request.decoder_ids)
        told.append(PromptLogprobs(tokens))
    asked = request.params.logprobs is not None
    logprobs = (TokenLogprob(70, -1.0, ()),) if asked else ()
    return [*told, Piece("C", (70,), logprobs=logprobs), finished(request, "length", 1)]


def test_decoder_prompt_in_both_forms():
    engine = FakeEngine(echoing)
    body = post(engine, {"prompt": "a", "decoder_prompt": "xy"}).json()
    assert engine.submitted[0].decoder_ids == (3 + 120, 3 + 121)
    assert body["choices"][0]["text"] == "C"
    assert body["usage"] == usage_of(2, 1, decoder=2)
    post(engine, {"prompt": "a", "decoder_prompt": [7, 8]})
    assert engine.submitted[1].decoder_ids == (7, 8)
    error = error_of(post(engine, {"prompt": "a", "decoder_prompt": [384]}), 400)
    assert error["param"] == "decoder_prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_decoder_prompt_with_its_logprobs(stream):
    body = {"prompt": "a", "decoder_prompt": "\u00e9x", "echo": True, "logprobs": 1}
    response = post(FakeEngine(echoing), {**body, "stream": stream})
    if stream:
        choices = [event["choices"][0] for event in events_of(response.text)]
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        told = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    else:
        (choice,) = response.json()["choices"]
        text, told = choice["text"], choice["logprobs"]
    assert text == "\u00e9xC"
    assert told["token_logprobs"] == [-0.5, -0.5, -0.5, -1.0]
    assert told["text_offset"] == [0, 0, 1, 2]  # two bytes make one character
    assert len(told["tokens"]) == len(told["top_logprobs"]) == 4


def test_echo_without_logprobs_and_with_samples():
    engine = FakeEngine(echoing)
    body = {"prompt": ["a", "b"], "decoder_prompt": "xy", "echo": True, "n": 2}
    choices = post(engine, body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["xyC"] * 4
    chunks = events_of(post(engine, {**body, "stream": True}).text)
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["xyC"] * 4


def test_echo_of_nothing_is_nothing():
    assert (
        post(FakeEngine(echoing), {"prompt": "a", "echo": True}).json()["choices"][0]["text"] == "C"
    )


def test_a_prompt_is_scored_as_evaluation_harnesses_ask_for_it():
    """lm-eval slices [context length : -1] of the lists: one entry for each id, and one more."""
    engine = FakeEngine(echoing)
    prompts = [[70, 71, 72], [73, 74]]
    body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    reply = post(engine, {**body, "seed": 1234}).json()
    assert [r.decoder_ids for r in engine.submitted] == [(70, 71, 72), (73, 74)]
    sentinel = engine.tokenizer.sentinel_id(0)
    assert {request.encoder_ids for request in engine.submitted} == {(sentinel,)}
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(prompt) + 1
        names = told["tokens"]
        pairs = zip(names, told["token_logprobs"], told["top_logprobs"], strict=True)
        assert all(likeliest[name] == value for name, value, likeliest in pairs)


def test_no_tokens_at_all_with_echo():
    body = {"prompt": "a", "decoder_prompt": "xy", "echo": True, "max_tokens": 0, "logprobs": 0}
    for stream in (False, True):
        engine = FakeEngine(echoing)
        response = post(engine, {**body, "stream": stream, "return_token_ids": True})
        assert engine.submitted[0].params.max_tokens == 1
        if stream:
            choices = [event["choices"][0] for event in events_of(response.text)]
            assert "".join(choice["text"] for choice in choices) == "xy"
            assert choices[-1]["finish_reason"] == "length"
        else:
            (choice,) = response.json()["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("xy", "length")
            assert choice["token_ids"] == []
            assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
            assert response.json()["usage"] == usage_of(2, 0, decoder=2)


def test_prompt_logprobs_by_token_id():
    body = {"prompt": "a", "decoder_prompt": [7, 8], "prompt_logprobs": 1}
    (choice,) = post(FakeEngine(echoing), body).json()["choices"]
    assert [sorted(told) for told in choice["prompt_logprobs"]] == [["7", "9"], ["8", "9"]]
    assert choice["prompt_logprobs"][0]["9"]["logprob"] == -0.25
    assert choice["logprobs"] is None
    error = error_of(post(FakeEngine(), {"prompt": "a", "prompt_logprobs": 1}), 400)
    assert error["param"] == "prompt_logprobs"


def ranked(request):
    """The sample with seed 11 is the likeliest per token, though not in all."""
    values = {10: (-1.0,), 11: (-0.75, -0.75), 12: (-2.0,)}[request.params.seed]
    logprobs = tuple(TokenLogprob(70, value, ()) for value in values)
    text = str(request.params.seed)
    return [Piece(text, (70,) * len(values), logprobs=logprobs), finished(request, "stop", 2)]


def test_best_of_tells_the_likeliest_samples():
    engine = FakeEngine(ranked)
    reply = post(engine, {"prompt": "a", "n": 2, "best_of": 3, "seed": 10}).json()
    assert [choice["text"] for choice in reply["choices"]] == ["11", "10"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in reply["choices"]] == [None, None]
    assert reply["usage"] == usage_of(2, 6)
    body = {"prompt": "a", "n": 2, "best_of": 3}
    assert error_of(post(engine, {**body, "stream": True}), 400)["param"] == "best_of"
    assert error_of(post(engine, {**body, "best_of": 1}), 400)["param"] == "best_of"
    assert error_of(post(engine, {**body, "best_of": 65}), 400)["param"] == "best_of"


def searching(request):
    answers = tuple(Answer(f"t{i}", (70 + i, 1), -float(i), "stop") for i in range(3))
    return [Searched(answers), finished(request, "stop", 6)]


def test_beams_are_choices_best_first():
    engine = FakeEngine(searching)
    body = {"prompt": ["a", "b"], "use_beam_search": True, "num_beams": 3, "n": 2}
    body |= {"length_penalty": 0.5, "early_stopping": True, "temperature": 0}
    reply = post(engine, {**body, "decoder_prompt": "x", "echo": True}).json()
    assert [request.task for request in engine.submitted] == [
        BeamParams(num_beams=3, length_penalty=0.5, stops_early=True)
    ] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == ["xt0", "xt1", "xt0", "xt1"]
    assert [choice["score"] for choice in reply["choices"]] == [0, -1, 0, -1]
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"logprobs": 1}, "logprobs"),
        ({"best_of": 4}, "best_of"),
        ({"fill": True}, "fill"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 33}, "num_beams"),
        ({"n": 33}, "n"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": False, "num_beams": 2}, "num_beams"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
        ({"num_beams": 30, "prompt": ["a", "b", "c"]}, "num_beams"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"bad_words": ["a"]}, "bad_words"),
    ],
)
def test_what_does_not_go_with_beams(extra, field):
    body = {"prompt": "a", "use_beam_search": True, **extra}
    assert error_of(post(FakeEngine(), body), 400)["param"] == field


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"fill": True, "decoder_prompt": "a"}, "decoder_prompt"),
        ({"fill": True, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"fill": True, "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"request_id": "a b"}, "request_id"),
        ({"timeout": 0}, "timeout"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": "a"}, "bad_words"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ],
)
def test_what_is_refused(extra, field):
    engine = FakeEngine()
    assert error_of(post(engine, {"prompt": "a", **extra}), 400)["param"] == field
    assert engine.submitted == []


def test_both_ways_to_ask_for_a_form():
    body = {"prompt": "a", "response_format": {"type": "json_object"}}
    error = error_of(post(FakeEngine(), body | {"structured_outputs": {"regex": "a"}}), 400)
    assert error["param"] == "structured_outputs"


@pytest.mark.parametrize(
    ("extra", "kind", "spec"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", '{"type":"object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "integer"}},
                }
            },
            "json_schema",
            '{"type":"integer"}',
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type":"null"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ],
)
def test_grammars_reach_the_engine(extra, kind, spec):
    engine = FakeEngine()
    assert post(engine, {"prompt": "a", **extra, "n": 2}).status_code == 200
    first, second = (request.params.grammar for request in engine.submitted)
    assert (first.kind, first.spec) == (kind, spec)
    assert second is first


def test_a_format_of_text_asks_for_nothing():
    engine = FakeEngine()
    post(engine, {"prompt": "a", "response_format": {"type": "text"}})
    assert engine.submitted[0].params.grammar is None


def test_fields_that_only_the_engine_sees():
    engine = FakeEngine()
    body = {"prompt": "a", "bad_words": ["no"], "include_stop_str_in_output": True, "timeout": 5}
    post(engine, {**body, "priority": 7, "cache_salt": "s", "stop": "x"})
    (request,) = engine.submitted
    assert request.params.bad_words == ((3 + 110, 3 + 111),)
    assert request.params.include_stop
    assert (request.deadline_s, request.key) == (5.0, "")
    assert request.priority == 0  # never above that of the caller
    assert request.salt == "/s"
    post(engine, {"prompt": "a", "priority": -3})
    assert engine.submitted[1].priority == -3
    assert engine.submitted[1].deadline_s == Settings().request_timeout_s


@pytest.mark.parametrize(
    ("side", "prompt", "kept"),
    [
        ("left", "abcd", (102, 103)),
        ("right", "abcd", (100, 101)),
        ("left", [5, 6, 7], (6, 7)),
        ("right", [5, 6, 7], (5, 6)),
        ("left", "a", (100,)),
    ],
)
def test_prompts_are_truncated(side, prompt, kept):
    engine = FakeEngine()
    post(engine, {"prompt": prompt, "truncate_prompt_tokens": 2, "truncation_side": side})
    assert engine.submitted[0].encoder_ids[:-1] == kept


@pytest.mark.parametrize("prompt", ["ab", [100, 101]])
def test_no_end_mark_on_request(prompt):
    engine = FakeEngine()
    post(engine, {"prompt": prompt, "add_special_tokens": False})
    assert engine.submitted[0].encoder_ids == (100, 101)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_on_request(stream):
    body = {"prompt": "a", "decoder_prompt": [7], "return_token_ids": True, "stream": stream}
    response = post(FakeEngine(), body)
    if stream:
        choices = [event["choices"][0] for event in events_of(response.text)]
        assert [choice["token_ids"] for choice in choices] == [[1], [2], []]
        assert [choice["prompt_token_ids"] is None for choice in choices] == [False, True, True]
    else:
        choices = response.json()["choices"]
        assert choices[0]["token_ids"] == [1, 2]
    assert choices[0]["prompt_token_ids"][0] == 100
    assert choices[0]["decoder_prompt_token_ids"] == [7]


def test_usage_in_each_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a", "stream": True, "stream_options": options}
    events = events_of(post(FakeEngine(), body).text)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 2, 2]


def test_id_of_the_client():
    assert post(FakeEngine(), {"prompt": "a", "request_id": "a-1"}).json()["id"] == "cmpl-a-1"


@pytest.mark.parametrize("way", ["body", "header", "setting"])
def test_strict_reading_names_the_nearest_field(way):
    body = {"prompt": "a", "temprature": 1}
    body |= {"strict": True} if way == "body" else {}
    client = client_of(FakeEngine(), strict_fields=way == "setting")
    headers = {"x-strict": "true"} if way == "header" else {}
    error = error_of(client.post(URL, json=body, headers=headers), 400)
    assert (error["code"], error["param"]) == ("unknown_parameter", "temprature")
    assert "'temperature'" in error["message"]


def test_strict_reading_of_what_is_like_nothing():
    error = error_of(post(FakeEngine(), {"prompt": "a", "qqqqq": 1, "strict": True}), 400)
    assert "did you mean" not in error["message"]


def test_user_is_told_to_the_log_as_a_hash(caplog):
    with caplog.at_level("INFO"):
        post(FakeEngine(), {"prompt": "a", "user": "Ada Lovelace"})
    assert "Ada" not in caplog.text
    assert "user=" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_receipt(stream):
    body = {"prompt": "a", "seed": 3, "n": 2, "receipt": True, "stream": stream, "odd": 1}
    body |= {"structured_outputs": {"regex": "a+"}}
    response = post(FakeEngine(), body)
    reply = events_of(response.text)[-1] if stream else response.json()
    receipt = reply["receipt"]
    assert receipt["seeds"] == [3, 4]
    assert receipt["model"] == "org/tiny"
    assert receipt["adapter"] is None
    assert receipt["fingerprint"] == reply["system_fingerprint"]
    assert receipt["ignored_fields"] == ["odd"]
    assert receipt["parameters"]["max_tokens"] == OPENAI_MAX_TOKENS
    checksum = hashlib.sha256(b"a+").hexdigest()
    assert receipt["parameters"]["grammar"] == {"kind": "regex", "sha256": checksum}
    assert "top_k" not in receipt["parameters"]  # as it always is
    assert receipt["model_fingerprint"] == FAKE_BASE.fingerprint
    assert receipt["is_batch_invariant"] is False


def test_receipt_by_header_and_none_without():
    client = client_of(FakeEngine())
    assert client.post(URL, json={"prompt": "a"}).json()["receipt"] is None
    headers = {"x-receipt": "1"}
    assert client.post(URL, json={"prompt": "a"}, headers=headers).json()["receipt"]


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(stream):
    engine = FakeEngine(lambda request: [Failed("too late", is_late=True)])
    response = post(engine, {"prompt": "a", "timeout": 1, "stream": stream})
    if stream:
        (event,) = events_of(response.text)
        assert event["error"]["code"] == "deadline_exceeded"
    else:
        assert error_of(response, 504)["code"] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"


def test_tokens_that_were_cached_are_told():
    engine = FakeEngine(lambda request: [replace(finished(request), cached_tokens=2)])
    usage = post(engine, {"prompt": "a", "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_prompt_too_long_for_the_settings():
    error = error_of(post(FakeEngine(), {"prompt": "a" * 101}, max_prompt_chars=100), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_an_object_has_no_more_than_so_many_fields():
    body = {"prompt": "a", **{f"odd{i}": i for i in range(MAX_FIELDS)}}
    assert str(MAX_FIELDS) in error_of(post(FakeEngine(), body), 400)["message"]
    assert post(FakeEngine(), dict(list(body.items())[:MAX_FIELDS])).status_code == 200


@pytest.mark.parametrize("is_start", [False, True])
@pytest.mark.parametrize("text", ["abc" * 5000, "\u4e2d\u6587" * 3000, "short"])
def test_the_end_of_a_text_is_tokenized_as_in_the_whole(text, is_start):
    tokenizer = ByteTokenizer()
    whole, some = tokenizer.encode(text), encode_end(text, 7, tokenizer, is_start=is_start)
    assert some[:7] == whole[:7] if is_start else some[-7:] == whole[-7:]
    assert len(some) < len(whole) or text == "short"


def test_texts_of_few_tokens_are_read_until_there_are_enough():
    class Sparse(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace(" ", ""))

    text = "ab" * 100 + " " * 20_000 + "cd"
    assert encode_end(text, 9, Sparse(), is_start=False)[-9:] == Sparse().encode(text)[-9:]


def test_long_bodies_hold_up_each_other_only():
    engine, settings = FakeEngine(), Settings()
    gateway = Gateway(engine, settings, Metrics(engine), None)
    end = threading.Event()

    def asking(body_bytes):
        return HttpRequest({"type": "http", "state": {"body_bytes": body_bytes}})

    async def run():
        long = [
            asyncio.create_task(gateway.build(asking(LONG_BODY_BYTES + 1), end.wait))
            for _ in range(4)
        ]
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(gateway.build(asking(9), lambda: 7), 300) == 7
        end.set()
        assert await asyncio.gather(*long) == [True] * 4

    asyncio.run(run())


def test_many_logprobs_are_told_as_few_are():
    tokens = MANY_SPOTS + 1
    piece = Piece("a", (100,), logprobs=(TokenLogprob(100, -1.0, ((100, -1.0),)),))
    engine = FakeEngine(lambda r: [*[piece] * tokens, finished(r, "length", tokens)])
    choice = post(engine, {"prompt": "a", "logprobs": 1}).json()["choices"][0]
    assert choice["text"] == "a" * tokens
    assert choice["logprobs"]["text_offset"] == list(range(tokens))

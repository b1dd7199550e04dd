"""POST /v1/completions: fields, choices, streams, failures, clients that leave."""

import json
import math
import socket
from dataclasses import replace

import httpx2
import openai
import pytest
from starlette.testclient import TestClient

from engine.errors import EngineStopped
from engine.request import Failed, Piece, Request, TokenLogprob
from engine.tokenizer import ByteTokenizer
from offload.pipeline import PipelineStats
from server.app import create_app
from server.logprobs import tell_logprobs
from server.replies import Transcript
from server.schemas import MAX_PROMPTS, OPENAI_MAX_TOKENS, UNSUPPORTED, CompletionRequest
from server.settings import Settings
from tests.fakes import HOLD, FakeEngine, finished, hello, live_server

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
            "spans": None,
        }
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
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
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}


@pytest.mark.parametrize("name", [*CompletionRequest.model_fields, *UNSUPPORTED])
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


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_take_neutral_values_only(name):
    for value in UNSUPPORTED[name]:
        assert post(FakeEngine(), {"prompt": "a", name: value}).status_code == 200
    error = error_of(post(FakeEngine(), {"prompt": "a", name: 7}), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == name


def test_best_of_may_equal_n():
    assert post(FakeEngine(), {"prompt": "a", "n": 2, "best_of": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_named(stream):
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    body = {"prompt": "a", "temprature": 1, "\u00fc,\r\n": 2, **(options if stream else {})}
    response = post(FakeEngine(), body)
    assert response.status_code == 200
    names = response.headers["x-ignored-fields"].split(",")
    assert names[:2] == ["temprature", "%C3%BC%2C%0D%0A"]
    assert names[2:] == (["stream_options.continuous_usage_stats"] if stream else [])


def test_field_names_with_half_characters():
    content = '{"prompt": "a", "\\ud800": 1}'
    headers = {"content-type": "application/json"}
    response = client_of(FakeEngine()).post(URL, content=content, headers=headers)
    assert error_of(response, 400)["message"].endswith("in valid Unicode")


def test_many_unknown_fields_make_a_short_header():
    response = post(FakeEngine(), {"prompt": "a"} | {f"{'x' * 100}{i}": 1 for i in range(1000)})
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
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


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
    entry = TokenLogprob(1, -2.0, ((2, -0.5), (3, -1.0)))
    told = tell_logprobs([entry], 0, lambda token_id: "same")
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
    text = "".join(transcript.add(Piece(f"p{i}", (1,), blank)) for i, blank in enumerate(blanks))
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


def test_full_queue_refuses_all_choices_or_none():
    engine = FakeEngine(room=1)
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
            assert engine.held.wait(5)
        assert engine.idle.wait(5)
        assert sorted(engine.cancelled) == sorted(r.request_id for r in engine.submitted)
        metrics = httpx2.get(f"{address}/metrics").text
    assert f'infmoe_requests_total{{route="{URL}",status="499"}} 1.0' in metrics


def test_silence_is_filled_with_comments():
    engine = FakeEngine(held)
    with (
        live_server(engine, keep_alive_s=0.02) as address,
        httpx2.stream("POST", address + URL, json={"prompt": "a", "stream": True}) as response,
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

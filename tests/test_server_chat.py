"""POST /v1/chat/completions: turns for the encoder, templates in their sandbox, chunks."""

import itertools
import json
from dataclasses import replace

import openai
import pytest
from starlette.testclient import TestClient

from engine.errors import CheckpointError, RequestError
from engine.request import Failed, Piece, TokenLogprob
from server.app import create_app
from server.chat import join_turns
from server.schemas_chat import ChatRequest, Message
from server.settings import Settings
from server.template_sandbox import TemplateCost
from server.templates import ChatTemplate, read_template, within
from tests.fakes import FakeEngine, finished, hello, live_server
from tests.test_server_completions import error_of, events_of, usage_of

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "ab"}


def client_of(engine, **settings):
    return TestClient(create_app(engine, Settings(**settings)), raise_server_exceptions=False)


def post(engine, body, **settings):
    return client_of(engine, **settings).post(URL, json={"messages": [USER], **body})


def read_by(engine):
    """What the encoder of the last request reads, without its end mark."""
    return engine.tokenizer.decode(engine.submitted[-1].encoder_ids[:-1])


def test_reply_has_the_shape_of_openai():
    response = post(FakeEngine(), {"model": "org/tiny", "seed": 5})
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["seed"]) == (0, "stop", 5)
    assert choice["logprobs"] is None
    assert body["usage"] == usage_of(3, 2)
    assert body["system_fingerprint"].startswith("fp_")


def test_content_is_never_null():
    engine = FakeEngine(lambda request: [finished(request)])
    assert post(engine, {}).json()["choices"][0]["message"]["content"] == ""


def test_a_limit_that_nobody_names_leaves_room_for_what_answers_begin_with():
    engine = FakeEngine()
    engine.config = replace(engine.config, max_model_len=20, answer_begin_ids=(70, 71))
    assert post(engine, {}).status_code == 200
    (request,) = engine.submitted
    assert (request.decoder_ids, request.params.max_tokens) == ((70, 71), 18)


def test_turns_are_joined_where_there_is_no_template():
    engine = FakeEngine()
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "x"}]
    post(engine, {"messages": [*turns, {"role": "user", "content": parts}]})
    assert read_by(engine) == "s\nab\nx\ncd"
    assert join_turns([Message(role="user", content="a")]) == "a"


def test_the_last_message_is_continued():
    engine = FakeEngine()
    messages = [USER, {"role": "assistant", "content": "xy"}]
    body = post(engine, {"messages": messages, "continue_final_message": True}).json()
    assert read_by(engine) == "ab"
    assert engine.tokenizer.decode(engine.submitted[0].decoder_ids) == "xy"
    assert body["choices"][0]["message"]["content"] == "Hello"  # what was given is not told again
    assert body["usage"] == usage_of(3, 2, decoder=2)


def test_how_much_is_written():
    engine = FakeEngine()
    for body in ({}, {"max_tokens": 7}, {"max_completion_tokens": 8}):
        post(engine, body)
    given = {"max_tokens": 9, "max_completion_tokens": 9}
    post(engine, given)
    assert [r.params.max_tokens for r in engine.submitted] == [256, 7, 8, 9]


@pytest.mark.parametrize("name", ChatRequest.model_fields)
def test_null_means_absent(name):
    response = post(FakeEngine(), {name: None})
    if name == "messages":
        assert error_of(response, 400)["param"] == "messages"
    else:
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"continue_final_message": True}, "messages"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ({"n": 65}, "n"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused(body, field):
    engine = FakeEngine()
    assert error_of(post(engine, body), 400)["param"] == field
    assert engine.submitted == []


def test_what_asks_for_nothing_passes():
    body = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": []}
    body |= {"metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}}
    response = post(FakeEngine(), body)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "metadata"


def with_logprobs(request):
    tokens = [TokenLogprob(i, -0.5, ((i, -0.5), (1, -2.0))) for i in (3 + 0xC3, 3 + 0xA9)]
    pieces = [Piece("", (3 + 0xC3,), logprobs=(tokens[0],))]
    return [*pieces, Piece("\u00e9", (3 + 0xA9,), logprobs=(tokens[1],)), finished(request)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_tell_bytes(stream):
    body = {"logprobs": True, "top_logprobs": 2, "stream": stream}
    engine = FakeEngine(with_logprobs)
    response = post(engine, body)
    assert engine.submitted[0].params.logprobs == 2
    if stream:
        told = [event["choices"][0]["logprobs"] for event in events_of(response.text)]
        content = [entry for part in told if part for entry in part["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "\u00e9"
    assert content[0]["top_logprobs"][1] == {"token": "token_id:1", "logprob": -2.0, "bytes": None}


def test_stream():
    options = {"include_usage": True}
    response = post(FakeEngine(), {"stream": True, "n": 2, "stream_options": options})
    *chunks, last = events_of(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["usage"] for chunk in chunks} == {None}
    for index in range(2):
        told = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in told] == [
            {"role": "assistant", "content": ""},
            {"content": "Hel"},
            {"content": "lo"},
            {},
        ]
        assert [choice["finish_reason"] for choice in told] == [None, None, None, "stop"]
    assert last["choices"] == []
    assert last["usage"] == usage_of(3, 4)


def test_failure_in_a_stream():
    engine = FakeEngine(lambda request: [Piece("a", (1,)), Failed("out of memory")])
    *_, last = events_of(post(engine, {"stream": True}).text)
    assert last["error"]["message"] == "out of memory"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ tone }}"
)


def render(source, settings=None, messages=(USER,), max_time_s=1.0):
    template = ChatTemplate(source, "<s>", "</s>")
    return template.render(messages, settings or {}, is_opening=True, max_time_s=max_time_s)


@pytest.mark.parametrize("place", ["file", "config", "list"])
def test_template_of_the_model_directory(tmp_path, place):
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        config = {"chat_template": TEMPLATE if place == "config" else named, "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    engine = FakeEngine()
    client = client_of(engine, model=tmp_path)
    messages = [USER, {"role": "assistant", "content": "x"}]
    kwargs = {"tone": "!", "tokenize": True, "messages": [], "other": [1]}
    body = {"messages": messages, "chat_template_kwargs": kwargs}
    assert client.post(URL, json=body).status_code == 200
    assert read_by(engine) == "<user>ab<assistant>x<assistant>!"
    client.post(URL, json={**body, "continue_final_message": True})
    assert read_by(engine) == "<user>ab!"


def test_no_template(tmp_path):
    assert read_template(None) is None
    assert read_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_template(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"{% for %}"),
        ("chat_template.jinja", b"{% include 'x' %}"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b" " * (2**20 + 1)),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", json.dumps({"chat_template": " " * (2**20 + 1)}).encode()),
    ],
)
def test_damaged_templates(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_template(tmp_path)


def test_template_that_is_a_directory(tmp_path):
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for a in range(10000000) %}{% endfor %}",
        "{{ 'a' * 100000000 }}",
        "{{ [1] * 100000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%100000000d' % 1 }}",
        "{% set n = namespace(t='aaaa') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}"
        "{% endfor %}",
        "{% set n = namespace(t='aaaa') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}"
        "{% endfor %}",
        "{% set n = namespace(t=9) %}{% for i in range(40) %}{% set n.t = n.t * n.t %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 'a'|center(100000000) }}",
        "{{ 'a'.ljust(100000000)|length }}",
        "{{ '{:>100000000}'.format('a')|length }}",
        "{{ ['a'.zfill(100000000)]|length }}",
        "{{ ('a' * 100000).replace('a', 'b' * 1000)|length }}",
        "{{ ('a' * 100000)|replace('a', 'b' * 1000)|length }}",
        "{{ ('b' * 1000).join([''] * 100000)|length }}",
        "{{ ([''] * 100000)|join('b' * 1000)|length }}",
        "{{ (['a' * 100000] * 1000)|join|length }}",
        "{{ ([''] * 4000000)|join|length }}",
        "{{ (['a' * 100000] * 1000)|string|length }}",
        "{{ (['a' * 100000] * 1000)|tojson|length }}",
        "{{ ['a' * 100000] * 1000 }}",
        "{{ ('' ~ (['a' * 100000] * 1000))|length }}",
        "{{ {'a': ['a' * 100000] * 1000} }}",
        "{% set n = namespace(t=[1]) %}{% for i in range(25) %}{% set n.t = [n.t, n.t] %}"
        "{% endfor %}{{ n.t|string|length }}",
        "{{ [1]|batch(100000000, 0)|list|length }}",
        "{{ 3|round(-100000000) }}",
        "{{ ([[0] * 1000] * 1000)|sum(start=[])|length }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ (messages|map(attribute='content')|list)|tojson(indent='a') }}",
    ],
)
def test_hostile_templates_are_refused(source):
    with pytest.raises(RequestError, match="chat template") as caught:
        render(source)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a-b-c'.replace('-', '+') }}{{ 'a-b-c'|replace('-', '', 1) }}", "a+b+cab-c"),
        ("{{ ', '.join(['a', 'b']) }}{{ [1, 2]|join('/') }}{{ [1]|join }}", "a, b1/21"),
        ("{{ messages|join(', ', attribute='role') }}", "user"),
        ("{{ [1, 2.5]|sum }}{{ [{'a': 2}]|sum(attribute='a') }}", "3.52"),
        ("{{ 2.345|round(1) }}{{ 2.5|round|int }}{{ [1, 'a']|string }}", "2.32[1, 'a']"),
        (
            "{% macro f(context, function) %}{{ context }}{{ function }}{% endmacro %}"
            "{{ f(function=1, context=2) }}",
            "21",
        ),
        ("{{ messages }}{{ none }}{{ {'a': 1} }}", f"{[dict(USER)]}None{{'a': 1}}"),
    ],
)
def test_what_is_bounded_is_as_it_was(source, text):
    assert render(source) == text


def test_template_without_an_end():
    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="takes too long"):
        render(loop, max_time_s=0.05)


def test_the_clock_spares_what_is_not_the_template():
    """Python would swallow what is raised in a destructor, and trace nothing from there on."""
    called = []

    class Thing:
        def __del__(self):
            called.append(True)

    def work():
        Thing()
        return ChatTemplate("{{ bos_token }}", "", "")._generate({})

    with pytest.raises(TemplateCost, match="takes too long"):
        within(0.0, work)
    assert called == [True]


def test_time_in_which_others_have_the_processor_is_not_a_template_s(monkeypatch):
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr("server.templates.perf_counter", lambda: next(hours))
    assert render("{% for a in range(9) %}{{ a }}{% endfor %}", max_time_s=300.0) == "012345678"


def test_what_a_template_may_use():
    source = "{{ bos_token }}{{ messages[0]['content']|trim|upper }}{{ messages|tojson }}{{ flag }}"
    text = render(source, {"flag": True, "eos_token": "no", "x": 1})
    assert text == '<s>AB[{"role": "user", "content": "ab"}]True'


def test_openai_client():
    with (
        live_server(FakeEngine(hello)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = client.chat.completions.create(model="org/tiny", messages=[USER])
        assert reply.choices[0].message.content == "Hello"
        options = {"include_usage": True}
        with client.chat.completions.create(
            model="org/tiny", messages=[USER], stream=True, stream_options=options
        ) as stream:
            chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 2


def test_parts_are_bounded_in_all():
    part = {"type": "text", "text": "a"}
    turns = [{"role": "user", "content": [part] * 501}] * 2
    assert "1000 parts" in error_of(post(FakeEngine(), {"messages": turns}), 400)["message"]
    for wrong in (1, True, "a", [1], [{"role": "user", "content": 1}]):
        assert post(FakeEngine(), {"messages": wrong}).status_code == 400

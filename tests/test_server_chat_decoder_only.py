"""Chats with a decoder-only model: what its template writes is the prompt, marks and all."""

import json
from dataclasses import replace
from datetime import datetime

import pytest
from starlette.testclient import TestClient

from engine.errors import RequestError
from engine.tokenizer_json import make_json_tokenizer
from server.app import create_app
from server.settings import Settings
from server.templates import ChatTemplate
from tests.fakes import FakeEngine
from tests.json_tokenizers import CHATML, train_byte_level
from tests.test_server_completions import error_of
from tests.tiny import LLAMA

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "ab"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_json_tokenizer("it", train_byte_level(380).to_str())


@pytest.fixture
def engine(tokenizer):
    """Its tokenizer puts <|endoftext|>, 0, before a text."""
    engine = FakeEngine()
    engine.tokenizer = tokenizer
    engine.config = replace(LLAMA, tokenizer="tokenizer_json", begin_token_ids=(0,))
    return engine


@pytest.fixture
def ask(engine, tmp_path):
    """Posts a chat, with a template, and returns the reply and the request that came of it."""

    def post(body, template=CHATML):
        if template is not None:
            values = {"chat_template": template, "bos_token": "<|endoftext|>"}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        app = create_app(engine, Settings(model=tmp_path))
        reply = TestClient(app).post(URL, json={"messages": [USER], **body})
        return reply, engine.submitted[-1] if engine.submitted else None

    return post


def test_the_rendered_text_is_the_prompt(ask, tokenizer):
    reply, request = ask({})
    assert reply.status_code == 200
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.encoder_ids) == tokenizer.encode(text)
    assert request.encoder_ids[0] == 1  # no mark of the beginning: the template writes none
    assert request.encoder_ids.count(1) == 2
    assert request.decoder_ids == ()


def test_the_mark_of_the_beginning_is_not_doubled(ask, tokenizer):
    _, request = ask({}, "{{ bos_token }}" + CHATML)
    assert request.encoder_ids[:2] == (0, 1)
    assert request.encoder_ids.count(0) == 1


def test_completions_have_it_put_in_front(ask, engine, tokenizer):
    ask({})
    app = create_app(engine, Settings())
    client = TestClient(app)
    assert client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200
    assert list(engine.submitted[-1].encoder_ids) == [0, *tokenizer.encode("ab")]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_and_then_the_decoder_prompt(engine, stream):
    client = TestClient(create_app(engine, Settings()))

    def echoed(body):
        body = {"prompt": ["ab", "cd"], "echo": True, "stream": stream, **body}
        reply = client.post("/v1/completions", json=body)
        if not stream:
            return [choice["text"] for choice in reply.json()["choices"]]
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        parts = [choice for line in lines for choice in json.loads(line)["choices"]]
        return ["".join(p["text"] for p in parts if p["index"] == i) for i in (0, 1)]

    plain = echoed({"echo": False})
    assert echoed({}) == ["ab" + plain[0], "cd" + plain[1]]
    assert echoed({"decoder_prompt": "x"}) == ["abx" + plain[0], "cdx" + plain[1]]


@pytest.mark.parametrize("asked", [{}, {"echo": True, "logprobs": 1, "max_tokens": 0}])
def test_all_tokens_of_the_prompt_are_counted(engine, asked):
    client = TestClient(create_app(engine, Settings()))
    usage = client.post("/v1/completions", json={"prompt": [5, 6, 7], **asked}).json()["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["prompt_tokens_details"]["encoder_tokens"] == 3


def test_the_mark_of_the_beginning_may_be_left_out(engine, tokenizer):
    client = TestClient(create_app(engine, Settings()))
    body = {"prompt": "ab<|im_end|>", "add_special_tokens": False}
    assert client.post("/v1/completions", json=body).status_code == 200
    ids = tokenizer.encode("ab<|im_end|>")
    assert list(engine.submitted[-1].encoder_ids) == ids
    assert client.post("/tokenize", json=body).json()["tokens"] == ids
    for text in ("ab", "<|endoftext|>ab"):
        tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert tokens == [0, *tokenizer.encode("ab")]


def test_the_card_tells_what_kind_of_model_it_is(engine):
    client = TestClient(create_app(engine, Settings()))
    assert client.get("/v1/models").json()["data"][0]["architecture"] == "decoder_only"


def test_without_the_mark_of_an_answer(ask, tokenizer):
    _, request = ask({"add_generation_prompt": False})
    assert list(request.encoder_ids) == tokenizer.encode("<|im_start|>user\nab<|im_end|>\n")


@pytest.mark.parametrize("opening", [{}, {"add_generation_prompt": False}])
def test_an_answer_that_is_continued(ask, tokenizer, opening):
    messages = [USER, {"role": "assistant", "content": "Well,"}]
    _, request = ask({"messages": messages, "continue_final_message": True, **opening})
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.encoder_ids) == tokenizer.encode(text)
    assert list(request.decoder_ids) == tokenizer.encode("Well,")


def test_the_answer_takes_the_room_that_is_left(ask, engine):
    _, request = ask({"messages": [{"role": "user", "content": "1" * 200}]})
    assert len(request.encoder_ids) + request.params.max_tokens == engine.config.max_positions


@pytest.mark.parametrize("length", [300, 30_000])
def test_a_conversation_that_is_too_long(ask, length):
    reply, request = ask({"messages": [{"role": "user", "content": "1" * length}]})
    assert "the limit is" in error_of(reply, 400)["message"]
    assert request is None


def test_a_model_without_a_template_is_told_so(ask):
    reply, _ = ask({}, template=None)
    error = error_of(reply, 400)
    assert error["param"] == "messages"
    assert "no chat template" in error["message"]
    assert "/v1/completions" in error["message"]


def test_blanks_are_not_filled(ask, engine):
    client = TestClient(create_app(engine, Settings()))
    reply = client.post("/v1/completions", json={"prompt": "a <span> b", "fill": True})
    assert "does not fill blanks" in error_of(reply, 400)["message"]


def render(source):
    return ChatTemplate(source, "", "").render([USER], {}, is_opening=True)


def test_tags_that_templates_of_today_use():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if true %}{% break %}{% endif %}x{% endfor %}"
    )
    assert render(source) == "ab"


def test_the_date():
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().astimezone().year)
    with pytest.raises(RequestError, match="chat template"):
        render("{{ strftime_now('%Y' * 100) }}")

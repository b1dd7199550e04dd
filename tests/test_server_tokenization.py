"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

import json

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.settings import Settings
from tests.fakes import FakeEngine
from tests.test_server_completions import error_of


def client_of(engine, **settings):
    return TestClient(create_app(engine, Settings(**settings)), raise_server_exceptions=False)


def test_there_and_back():
    engine = FakeEngine()
    client = client_of(engine)
    body = {"prompt": "a\u00e9", "add_special_tokens": False, "model": "org/tiny"}
    reply = client.post("/tokenize", json=body).json()
    ids = engine.tokenizer.encode("a\u00e9")
    assert reply == {
        "tokens": ids,
        "count": 3,
        "max_model_len": reply["max_model_len"],
        "token_strs": None,
    }
    text = client.post("/detokenize", json={"tokens": ids}).json()
    assert text == {"prompt": "a\u00e9"}


def test_end_mark_and_names():
    engine = FakeEngine()
    reply = client_of(engine).post("/tokenize", json={"prompt": "a", "return_token_strs": True})
    sentinel = engine.tokenizer.sentinel_id(0)
    assert reply.json()["tokens"] == [100, sentinel]  # what the encoder of this model reads
    assert reply.json()["token_strs"] == ["a", "<extra_id_0>"]


def test_marks_in_a_text_are_text():
    body = {"prompt": "<extra_id_0></s>", "add_special_tokens": False}
    assert client_of(FakeEngine()).post("/tokenize", json=body).json()["count"] == 16


def test_nothing_is_fine():
    client = client_of(FakeEngine())
    body = {"prompt": "", "add_special_tokens": False}
    assert client.post("/tokenize", json=body).json()["tokens"] == []
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "field", "status"),
    [
        ("/tokenize", {}, "prompt", 400),
        ("/tokenize", {"prompt": 5}, "prompt", 400),
        ("/tokenize", {"prompt": "a" * 101}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model", 404),
        ("/detokenize", {}, "tokens", 400),
        ("/detokenize", {"tokens": [384]}, "tokens", 400),
        ("/detokenize", {"tokens": [-1]}, "tokens", 400),
        ("/detokenize", {"tokens": ["a"]}, "tokens", 400),
    ],
)
def test_what_is_refused(path, body, field, status):
    response = client_of(FakeEngine(), max_prompt_chars=100).post(path, json=body)
    assert error_of(response, status)["param"] == field


def test_half_characters():
    content = '{"prompt": "\\ud800"}'
    headers = {"content-type": "application/json"}
    response = client_of(FakeEngine()).post("/tokenize", content=content, headers=headers)
    assert error_of(response, 400)["param"] == "prompt"


def test_info(tmp_path):
    info = client_of(FakeEngine()).get("/tokenizer_info").json()
    assert (info["eos_token"], info["eos_token_id"], info["pad_token"]) == ("</s>", 1, "<pad>")
    assert (info["bos_token"], info["chat_template"]) == (None, None)
    assert (info["tokenizer_class"], info["vocab_size"]) == ("ByteTokenizer", 384)
    config = {"chat_template": "{{ 1 }}", "eos_token": {"content": "<e>"}, "bos_token": "<b>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    info = client_of(FakeEngine(), model=tmp_path).get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<e>", "<b>")
    assert info["chat_template"] == "{{ 1 }}"


def test_before_the_model_is_there():
    engine = FakeEngine()
    engine.state = "loading"
    client = client_of(engine)
    for response in (
        client.post("/tokenize", json={"prompt": "a"}),
        client.post("/detokenize", json={"tokens": [5]}),
        client.get("/tokenizer_info"),
    ):
        assert error_of(response, 503)["code"] == "model_loading"

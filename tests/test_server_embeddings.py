"""POST /v1/embeddings: numbers and base64, and that they are the mean of the encoder's output."""

import base64
import struct

import openai
import pytest
import torch
from starlette.testclient import TestClient

from engine.request import Embedded, Pooling
from server.app import create_app
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from server.settings import Settings
from tests.fakes import FakeEngine, finished, live_server, tiny_worker
from tests.test_server_completions import error_of
from tests.tiny import byte_tokenizer, tiny_model

URL = "/v1/embeddings"
VECTOR = (0.5, -1.25, 3.0)


def embedding(request):
    return [Embedded(VECTOR), finished(request, "stop", 0)]


def post(engine, body, **settings):
    app = create_app(engine, Settings(**settings))
    return TestClient(app, raise_server_exceptions=False).post(URL, json=body)


@pytest.mark.parametrize(
    ("given", "num_texts"), [("a", 1), (["a", "bc"], 2), ([5, 6], 1), ([[5], [6, 7]], 2)]
)
def test_one_vector_for_each_input(given, num_texts):
    engine = FakeEngine(embedding)
    reply = post(engine, {"input": given, "model": "org/tiny"}).json()
    assert [one["embedding"] for one in reply["data"]] == [list(VECTOR)] * num_texts
    assert [one["index"] for one in reply["data"]] == list(range(num_texts))
    assert {request.task for request in engine.submitted} == {Pooling()}
    num_tokens = sum(len(request.encoder_ids) for request in engine.submitted)
    assert reply["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert (reply["object"], reply["model"]) == ("list", "org/tiny")


def test_base64_is_little_endian_float32():
    reply = post(FakeEngine(embedding), {"input": "a", "encoding_format": "base64"}).json()
    packed = base64.b64decode(reply["data"][0]["embedding"])
    assert struct.unpack("<3f", packed) == VECTOR


def test_own_width_and_ignored_fields():
    response = post(FakeEngine(embedding), {"input": "a", "dimensions": 8, "odd": 1, "user": None})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "odd"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": []}, "input"),
        ({"input": ["a"] * 65}, "input"),
        ({"input": ""}, "input"),
        ({"input": [384]}, "input"),  # of another vocabulary, as some clients send
        ({"input": 5}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 4}, "dimensions"),
        ({"odd": 1, "strict": True}, "odd"),
    ],
)
def test_what_is_refused(body, field):
    engine = FakeEngine(embedding)
    assert error_of(post(engine, {"input": "a", **body}), 400)["param"] == field
    assert engine.submitted == []


def test_engine_without_an_answer():
    engine = FakeEngine(lambda request: [finished(request)])
    assert error_of(post(engine, {"input": "a"}), 500)["code"] == "engine_failure"


def test_openai_client():
    with (
        live_server(FakeEngine(embedding)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = client.embeddings.create(model="org/tiny", input=["a", "b"])
    assert [one.embedding for one in reply.data] == [list(VECTOR)] * 2


def test_vectors_are_means_of_the_encoder():
    model, tokenizer = tiny_model(), byte_tokenizer()
    with tiny_worker() as worker:
        client = TestClient(create_app(worker, Settings()))
        reply = client.post(URL, json={"input": ["hello", "no"]}).json()
    for text, found in zip(("hello", "no"), reply["data"], strict=True):
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.sentinel_id(0)]])
        with torch.inference_mode():
            wanted = model.encode(ids, torch.ones_like(ids))[0].mean(0)
        assert found["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_what_is_read_is_on_the_bill(tmp_path):
    record = KeyRecord(name="alice", sha256=hash_key("key"), tokens_per_minute=6)
    write_keys(tmp_path / "keys", [record])
    app = create_app(FakeEngine(embedding), Settings(keys_file=tmp_path / "keys"))
    client = TestClient(app, headers={"authorization": "Bearer key"})
    assert client.post(URL, json={"input": "abc"}).status_code == 200
    (row,) = client.get("/v1/usage").json()["data"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (4, 0)
    assert error_of(client.post(URL, json={"input": "abc"}), 429)["code"] == "rate_limit_exceeded"

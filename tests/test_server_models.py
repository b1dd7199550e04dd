"""GET /v1/models: the card of the base model. Those of adapters: test_server_adapters.py."""

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from tests.fakes import FakeEngine
from tests.test_server_completions import error_of


def test_the_base_model_has_its_limits():
    client = TestClient(create_app(FakeEngine()))
    (card,) = client.get("/v1/models").json()["data"]
    assert card == client.get("/v1/models/org/tiny").json()
    assert (card["id"], card["object"], card["kind"]) == ("org/tiny", "model", "base")
    assert (card["root"], card["parent"], card["state"]) == ("org/tiny", None, "ready")
    longest = client.get("/v1/info").json()["limits"]["max_tokens"]
    assert card["max_model_len"] == card["max_input_tokens"] == longest
    assert card["max_decoder_tokens"] == longest


@pytest.mark.parametrize("name", ["other", "org", "org/tiny/", "../x", "%00"])
def test_other_models(name):
    response = TestClient(create_app(FakeEngine())).get(f"/v1/models/{name}")
    assert error_of(response, 404)["code"] in ("model_not_found", "not_found")


def test_nothing_is_listed_before_it_is_there():
    engine = FakeEngine()
    engine.state = "loading"
    client = TestClient(create_app(engine))
    assert error_of(client.get("/v1/models"), 503)["code"] == "model_loading"
    assert error_of(client.get("/v1/models/org/tiny"), 503)["code"] == "model_loading"

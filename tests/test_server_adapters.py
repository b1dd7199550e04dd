"""Adapters over HTTP: chosen by requests, listed, pinned, uploaded, replaced under load."""

import errno
import gzip
import io
import os
import shutil
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import anyio
import httpx2
import pytest
from starlette.testclient import TestClient

from engine.adapter_upload import PREFIX
from engine.adapters import load_adapter
from engine.adapters_manifest import write_manifest
from engine.errors import ConfigError, RequestError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.worker import LoadedModel, Worker
from server import adapters_admin
from server.adapters import adapter_cards, choose_adapter, find_card, open_adapters
from server.app import create_app
from server.errors import ApiError
from server.settings import Settings
from server.tarball import MAX_MEMBERS, TarReader
from tests.adapter_folders import adapter_files, make_tar, vectors, write_files
from tests.fakes import FakeEngine, live_server
from tests.tiny import DENSE, byte_tokenizer, tiny_model
from tests.waiting import wait_for

KEY = "a-key-for-tests-only"
HEADERS = {"authorization": f"Bearer {KEY}"}
MODEL = tiny_model(DENSE, seed=5)
TOKENIZER = byte_tokenizer()
ADMIN = "/admin/adapters"


@pytest.fixture(scope="module")
def worker():
    worker = Worker("org/tiny", lambda report: LoadedModel(MODEL, TOKENIZER))
    worker.start()
    wait_for(lambda: worker.state == "ready")
    yield worker
    worker.drain(5.0)


def put(root, name, version, seed=0, **how):
    path = write_files(root / name / version, adapter_files(seed=seed, **how))
    write_manifest(path)
    return path


@pytest.fixture
def client(worker, tmp_path):
    return open_client(worker, tmp_path)


def open_client(worker, root, **settings):
    settings = {"adapters": root, "api_key": KEY, "adapter_poll_s": 3600.0} | settings
    app = create_app(worker, Settings(**settings))
    return TestClient(app, headers=HEADERS, raise_server_exceptions=False)


def ask(client, **body):
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | body
    return client.post("/v1/completions", json=body)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def answer_alone(path=None, prompt="hello", **params):
    """What one version says when it is asked by itself, without a server."""
    params = {"max_tokens": 8, "ignore_eos": True} | params
    adapter = load_adapter(path, DENSE, MODEL.embedding.weight.dtype) if path else None
    request = build_request(
        prompt, TOKENIZER, DENSE, SamplingParams(**params), "alone", adapter=adapter
    )
    events = generate(MODEL, TOKENIZER, request)
    return "".join(event.text for event in events if isinstance(event, Piece))


# --- choosing


def test_each_way_of_choosing_gives_the_answer_of_that_version(client, tmp_path):
    paths = {version: put(tmp_path, "task", version, int(version)) for version in "12"}
    answers = {version: answer_alone(path) for version, path in paths.items()}
    assert len({*answers.values(), answer_alone()}) == 3
    for fields, version in [
        ({"model": "task"}, "2"),
        ({"model": "task@1"}, "1"),
        ({"adapter": "task"}, "2"),
        ({"adapter_id": "task@1"}, "1"),
        ({"model": "org/tiny", "adapter": "task@1"}, "1"),
        ({"model": "task@1", "adapter": "task@1", "adapter_id": "task@1"}, "1"),
    ]:
        response = ask(client, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["x-adapter"] == f"task@{version}"
        body = response.json()
        assert body["adapter"] == f"task@{version}"
        assert body["choices"][0]["text"] == answers[version]
        assert body["model"] == next(iter(fields.values()))  # as it was asked for
    for fields in ({}, {"adapter": ""}, {"adapter_id": "org/tiny"}, {"model": "org/tiny"}):
        response = ask(client, **fields)
        assert response.json()["choices"][0]["text"] == answer_alone()
        assert "x-adapter" not in response.headers


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "task", "adapter": "other"}, 400, "adapter_conflict", "adapter"),
        ({"model": "task", "adapter_id": ""}, 400, "adapter_conflict", "adapter_id"),
        ({"adapter": "task", "adapter_id": "task@1"}, 400, "adapter_conflict", "adapter_id"),
        ({"adapter": "org/tiny", "adapter_id": "task"}, 400, "adapter_conflict", "adapter_id"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"model": "task@9"}, 404, "model_not_found", "model"),
        ({"adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
        ({"adapter_id": "../task"}, 404, "adapter_not_found", "adapter_id"),
        ({"adapter": "task@"}, 404, "adapter_not_found", "adapter"),
        ({"adapter": "broken"}, 404, "adapter_failed", "adapter"),
    ],
)
def test_what_cannot_be_chosen(client, tmp_path, fields, status, code, param):
    put(tmp_path, "task", "1")
    (put(tmp_path, "broken", "1") / "adapter_config.json").write_text("{")
    response = ask(client, **fields)
    error = error_of(response, status)
    assert (error["code"], error["param"]) == (code, param)
    assert str(tmp_path) not in response.text


def test_without_a_directory_there_are_no_adapters_and_no_routes():
    client = TestClient(create_app(FakeEngine(), Settings(api_key=KEY)), headers=HEADERS)
    assert error_of(ask(client, adapter="task"), 404)["code"] == "adapter_not_found"
    assert error_of(ask(client, model="task"), 404)["code"] == "model_not_found"
    assert ask(client, adapter="").status_code == 200
    assert error_of(client.get(ADMIN), 404)["code"] == "not_found"


def test_a_directory_that_is_not_there_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="nowhere cannot be read: No such file"):
        create_app(FakeEngine(), Settings(adapters=tmp_path / "nowhere"))


def test_a_key_uses_the_adapters_on_its_list(worker, tmp_path):
    put(tmp_path, "task", "1")
    put(tmp_path, "other", "1")
    client = open_client(worker, tmp_path)
    caller = SimpleNamespace(may_use_adapter=lambda name: name.partition("@")[0] == "task")
    adapters = open_adapters(worker, Settings(adapters=tmp_path, adapter_poll_s=3600.0))
    assert [card.id for card in adapter_cards(adapters, worker, caller)] == ["task"]
    assert find_card(adapters, worker, "other", caller) is None
    assert find_card(adapters, worker, "task", caller).parent == "org/tiny"

    async def choose(name):
        return await choose_adapter(adapters, worker, adapter=name, caller=caller)

    assert anyio.run(choose, "task").reference == "task@1"
    for name in ("other", "nobody"):  # whether there is one is not told
        with pytest.raises(ApiError, match="may not use") as caught:
            anyio.run(choose, name)
        assert (caught.value.status, caught.value.code) == (403, "adapter_not_allowed")
    assert client.get("/v1/models").status_code == 200


def test_defaults_of_an_adapter_yield_to_the_request(client, tmp_path):
    defaults = {"max_tokens": 3, "stop": ["\x00\x01never"]}
    path = put(tmp_path, "task", "1", ours={"defaults": defaults})
    body = {"prompt": "hello", "temperature": 0, "ignore_eos": True, "model": "task"}
    short = client.post("/v1/completions", json=body).json()
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["text"] == answer_alone(path, max_tokens=3)
    given = client.post("/v1/completions", json=body | {"max_tokens": 5}).json()
    assert given["usage"]["completion_tokens"] == 5


def test_a_least_length_of_an_adapter_that_the_request_has_no_room_for(client, tmp_path):
    put(tmp_path, "task", "1", ours={"defaults": {"min_tokens": 5}})
    body = {"prompt": "hello", "model": "task", "max_tokens": 3}
    error = error_of(client.post("/v1/completions", json=body), 400)
    assert error["param"] == "max_tokens"
    assert error["message"] == (
        "max_tokens is 3, and the adapter task@1 presets min_tokens 5; "
        "give min_tokens as well, or a higher max_tokens"
    )
    for more in ({"min_tokens": 0}, {"max_tokens": 5}):
        assert client.post("/v1/completions", json=body | more).status_code == 200


def test_models_lists_adapters_under_their_base(client, tmp_path):
    put(tmp_path, "task", "1")
    assert ask(client, model="task").status_code == 200
    base, card = client.get("/v1/models").json()["data"]
    assert (card["id"], card["parent"], card["root"]) == ("task", base["id"], base["id"])
    assert card["adapter"] == {
        "type": "soft_prompt",
        "version": "1",
        "state": "resident",
        "num_vectors": 3,
    }
    assert client.get("/v1/models/task").json() == card
    assert error_of(client.get("/v1/models/nobody"), 404)["code"] == "model_not_found"


# --- administration


def test_admin_routes_need_a_key_for_them(worker, tmp_path):
    put(tmp_path, "task", "1")
    client = open_client(worker, tmp_path)
    asked = [("GET", ADMIN), ("GET", f"{ADMIN}/task"), ("DELETE", f"{ADMIN}/task/1")]
    asked += [("PUT", f"{ADMIN}/task/2"), ("POST", f"{ADMIN}/task:pin")]
    for method, path in asked:
        assert error_of(client.request(method, path, headers={"authorization": ""}), 401)
    open_to_all = TestClient(create_app(worker, Settings(adapters=tmp_path, adapter_poll_s=3600.0)))
    for method, path in asked:
        assert error_of(open_to_all.request(method, path), 403)["code"] == "insufficient_scope"
    assert (tmp_path / "task" / "1").is_dir()


def test_the_list_tells_states_page_by_page(client, tmp_path):
    put(tmp_path, "a", "1")
    put(tmp_path, "b", "1", tensor=vectors(3, width=16))
    put(tmp_path, "b", "2")
    (tmp_path / "empty").mkdir()
    for name in ("a", "b@1"):
        ask(client, model=name)
    admin = client.get(f"{ADMIN}/b").json()
    assert [(v["version"], v["state"]) for v in admin["versions"]] == [
        ("2", "discovered"),
        ("1", "failed"),
    ]
    assert "shape" in admin["versions"][1]["reason"]
    assert str(tmp_path) not in str(admin)
    page = client.get(ADMIN, params={"limit": 1}).json()
    assert [entry["name"] for entry in page["data"]] == ["a"]
    assert page["data"][0]["state"] == "resident"
    assert page["used_bytes"] == page["data"][0]["bytes"] == vectors(3).nbytes
    rest = client.get(ADMIN, params={"after": page["next_after"]}).json()
    assert [entry["name"] for entry in rest["data"]] == ["b", "b"]
    assert rest["next_after"] is None
    assert error_of(client.get(f"{ADMIN}/nobody"), 404)["code"] == "adapter_not_found"
    assert error_of(client.get(ADMIN, params={"limit": 0}), 400)


def test_load_pin_unpin_unload_roll_back_delete(client, worker, tmp_path):
    for version in "12":
        put(tmp_path, "task", version, int(version))

    def act(action, **body):
        response = client.post(f"{ADMIN}/task:{action}", json=body)
        assert response.status_code == 200, response.text
        entry = response.json()
        return entry["version"], entry["state"]

    assert act("load") == ("2", "resident")
    assert act("pin", version="1") == ("1", "pinned")
    again = open_adapters(worker, Settings(adapters=tmp_path, adapter_any_base=True))
    assert again.store.resident() == ["task@1"]  # after a restart
    assert act("unpin", version="1") == ("1", "resident")
    assert act("unload", version="1") == ("1", "evicted")
    assert act("rollback", version="1") == ("1", "resident")
    assert client.get(f"{ADMIN}/task").json()["current"] == "1"
    assert ask(client, model="task").headers["x-adapter"] == "task@1"
    assert client.post(f"{ADMIN}/task:unload").json()["version"] == "1"  # no body at all
    for action in ("load", "pin", "rollback"):
        response = client.post(f"{ADMIN}/task:{action}", json={"version": "9"})
        assert error_of(response, 404)["code"] == "adapter_not_found"
    assert error_of(client.post(f"{ADMIN}/task:rollback", json={}), 400)["param"] == "version"
    assert error_of(client.post(f"{ADMIN}/task:load", json={"versoin": "1"}), 400)
    assert error_of(client.post(f"{ADMIN}/task:explode", json={}), 405)
    assert client.delete(f"{ADMIN}/task/1").json()["deleted"] is True
    assert ask(client, model="task").headers["x-adapter"] == "task@2"
    assert client.delete(f"{ADMIN}/task").status_code == 200
    assert error_of(client.delete(f"{ADMIN}/task"), 404)
    assert error_of(ask(client, model="task"), 404)


# --- uploads


def upload(client, body, name="task", version="1", **headers):
    return client.put(f"{ADMIN}/{name}/{version}", content=body, headers=headers)


def is_clean(root):
    return not [path for path in root.iterdir() if path.name.startswith(PREFIX)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_upload_is_served_and_becomes_current(client, tmp_path, mode):
    put(tmp_path, "task", "9", seed=9)
    assert ask(client, model="task").headers["x-adapter"] == "task@9"
    files = adapter_files(seed=1, ours={"version": "other"})
    body = make_tar({f"./{name}": data for name, data in files.items()}, mode)
    response = upload(client, body)
    assert response.status_code == 201, response.text
    entry = response.json()
    assert (entry["name"], entry["version"], entry["is_current"]) == ("task", "1", True)
    answer = ask(client, model="task")
    assert answer.headers["x-adapter"] == "task@1"
    assert answer.json()["choices"][0]["text"] == answer_alone(tmp_path / "task" / "1")
    assert client.post(f"{ADMIN}/task:rollback", json={"version": "9"}).status_code == 200
    again = upload(client, body)
    assert again.status_code == 200
    assert again.json()["is_current"] is False
    other = upload(client, make_tar(adapter_files(seed=2)))
    assert error_of(other, 409)["code"] == "version_exists"
    assert other.headers["x-should-retry"] == "false"
    assert is_clean(tmp_path)


def test_what_tar_itself_writes_is_understood(client, tmp_path):
    files = adapter_files() | {"README.md": b"made by hand", "._README.md": b"shadow"}
    folder = write_files(tmp_path.parent / f"{tmp_path.name}-made", files)
    for number, options in enumerate((["-cf"], ["-czf"], ["--format=gnu", "-cf"])):
        tar = folder / "x.tar"
        tar.unlink(missing_ok=True)
        os.spawnvp(os.P_WAIT, "tar", ["tar", *options, str(tar), "-C", str(folder), *files])
        assert upload(client, tar.read_bytes(), version=str(number)).status_code == 201
    shutil.rmtree(folder)
    listed = sorted(path.name for path in (tmp_path / "task" / "0").iterdir())
    assert listed == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]


def one_member(name="adapter_config.json", data=b"{}", **fields):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in fields.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


GOOD = make_tar(adapter_files())
BOMB = gzip.compress(b"\0" * 30_000_000)
BAD_ARCHIVES = {
    "nothing": b"",
    "one byte": b"\x1f",
    "pickle": b"\x80\x04\x95" + b"x" * 600,
    "text": b"hello" * 200,
    "zip": b"PK\x03\x04" + bytes(600),
    "truncated": GOOD[:1500],
    "no end": GOOD[: -(-len(GOOD.rstrip(b"\0")) // 512) * 512],
    "truncated gzip": gzip.compress(GOOD)[:-20],
    "damaged gzip": gzip.compress(GOOD)[:40] + b"x" * 40,
    "behind the end": GOOD + b"x" * 512,
    "behind gzip": gzip.compress(GOOD) + b"more",
    "in a folder": make_tar({f"task/{name}": data for name, data in adapter_files().items()}),
    "climbing": one_member("../adapter_config.json"),
    "absolute": one_member("/etc/passwd"),
    "unknown": one_member("evil.py"),
    "unknown hidden": one_member(".bashrc"),
    "pickle file": one_member("adapter_model.bin"),
    "symlink": one_member(type=tarfile.SYMTYPE, linkname="/etc/passwd", data=b""),
    "hard link": one_member(type=tarfile.LNKTYPE, linkname="x", data=b""),
    "device": one_member(type=tarfile.CHRTYPE, data=b""),
    "fifo": one_member(type=tarfile.FIFOTYPE, data=b""),
    "folder": one_member("adapter_config.json", type=tarfile.DIRTYPE, data=b""),
    "long name": make_tar({"x" * 300: b""}, format=tarfile.GNU_FORMAT),
    "twice": one_member()[:1024] + one_member(),
    "many": make_tar({f"._{number}": b"" for number in range(MAX_MEMBERS + 1)}),
    "missing vectors": one_member(),
    "bomb": BOMB,
    "huge size": one_member().replace(b"00000000002\0", b"77777777777\0"),
    "binary size": one_member().replace(b"00000000002\0", b"\x80" + bytes(11)),
    "large notes": one_member(type=tarfile.XHDTYPE, data=b"x" * 70_000),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_is_refused_and_leaves_nothing(client, tmp_path, kind):
    start = time.monotonic()
    response = upload(client, BAD_ARCHIVES[kind])
    assert error_of(response, 400)["code"] == "invalid_upload"
    assert "Traceback" not in response.text
    assert str(tmp_path) not in response.text
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], [".upload.lock"])
    assert time.monotonic() - start < 60


def test_a_bomb_is_not_unpacked_beyond_the_limit():
    reader = TarReader(SimpleNamespace(begin=print, write=print), 10**6)
    with pytest.raises(RequestError, match="more than 1000000 bytes"):
        reader.feed(BOMB)


@pytest.mark.parametrize("piece", [1, 7, 511, 512, 513, 10**6])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_in_any_pieces_gives_the_same_files(piece, mode):
    files = adapter_files() | {"infmoe_adapter.json": b"x" * 512}
    found = {}

    class Sink:
        def begin(self, name):
            self.name = name
            found[name] = b""

        def write(self, data):
            found[self.name] += data

    reader = TarReader(Sink(), 10**6)
    body = make_tar(files, mode)
    for start in range(0, len(body), piece):
        reader.feed(body[start : start + piece])
    reader.finish()
    assert found == files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (adapter_files(tensor=vectors(3) * float("nan")), "NaN or infinite"),
        (adapter_files(tensor=vectors(3, width=8)), "shape"),
        (adapter_files() | {"adapter_model.safetensors": b"\x80\x04pickle"}, "no safetensors"),
        (adapter_files() | {"adapter_model.safetensors": b"\xff" * 64}, "no safetensors"),
        (adapter_files() | {"adapter_config.json": b"[" * 100_000}, "is no JSON"),
        (adapter_files(ours={"base_fingerprint": "another"}), "another base"),
        (adapter_files() | {"manifest.json": b'{"files": {}}'}, "is not what manifest.json"),
    ],
)
def test_an_upload_that_cannot_be_served_is_refused(client, tmp_path, files, message):
    response = upload(client, make_tar(files))
    error = error_of(response, 400)
    assert error["code"] == "invalid_adapter"
    assert message in error["message"]
    assert PREFIX not in response.text
    assert str(tmp_path) not in response.text
    assert not (tmp_path / "task").exists()
    assert is_clean(tmp_path)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("..", "1"),
        ("task", ".."),
        ("task", "current"),
        (".x", "1"),
        ("a" * 65, "1"),
        ("task", "a b"),
        ("task", "x" * 65),
        ("%2e%2e%2fx", "1"),
        ("task%00", "1"),
        ("t\u0430sk", "1"),
        ("task", "..%2f..%2fx"),
        ("a\\b", "1"),
    ],
)
def test_names_of_uploads_cannot_leave_the_directory(client, tmp_path, name, version):
    inside = tmp_path / "inside"
    response = client.request("PUT", f"{ADMIN}/{name}/{version}", content=GOOD)
    assert response.status_code in (400, 404, 405)
    assert list(response.json()) == ["error"]
    assert not inside.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {".upload.lock"}


def test_uploads_are_bounded(worker, tmp_path):
    client = open_client(worker, tmp_path, max_upload_bytes=4000)
    declared = upload(client, GOOD)
    assert error_of(declared, 413)["code"] == "body_too_large"

    def pieces():
        for start in range(0, len(GOOD), 1000):
            yield GOOD[start : start + 1000]

    assert error_of(upload(client, pieces()), 413)
    packed = upload(client, gzip.compress(GOOD))
    assert "more than 4000 bytes" in error_of(packed, 400)["message"]
    assert is_clean(tmp_path)


def full_disk(limit, real=os.write):
    """A file system that takes some bytes and no more."""
    taken = 0

    def write(handle, data):
        nonlocal taken
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith("adapter_"):
            if taken + len(data) > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken += len(data)
        return real(handle, data)

    return write


@pytest.mark.parametrize("limit", [0, 200])
def test_a_full_disk_refuses_the_upload_and_serving_goes_on(client, tmp_path, monkeypatch, limit):
    put(tmp_path, "task", "1")
    monkeypatch.setattr(os, "write", full_disk(limit))
    response = upload(client, GOOD, version="2")
    assert error_of(response, 507)["code"] == "disk_full"
    assert response.headers["x-should-retry"] == "false"
    assert is_clean(tmp_path)
    assert ask(client, model="task").headers["x-adapter"] == "task@1"
    monkeypatch.undo()
    assert upload(client, GOOD, version="2").status_code == 201


def test_a_disk_that_is_nearly_full_refuses_before_anything_is_written(
    client, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapters_admin, "MIN_FREE_BYTES", 2**62)
    assert error_of(upload(client, GOOD), 507)["code"] == "disk_full"
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_a_failure_of_the_server(client, tmp_path):
    (tmp_path / ".upload.lock").mkdir()
    response = upload(client, GOOD)
    assert error_of(response, 500)["code"] == "storage_failed"
    assert str(tmp_path) not in response.text


def test_a_client_that_goes_in_the_middle_of_an_upload_leaves_nothing(worker, tmp_path):
    with serving(worker, tmp_path) as address:

        def half():
            yield GOOD[:3000]
            raise ConnectionError

        with pytest.raises(ConnectionError):
            httpx2.put(f"{address}{ADMIN}/task/1", content=half(), headers=HEADERS, timeout=300)
        wait_for(lambda: is_clean(tmp_path))
        assert not (tmp_path / "task").exists()
        done = httpx2.put(f"{address}{ADMIN}/task/1", content=GOOD, headers=HEADERS, timeout=300)
        assert done.status_code == 201


@contextmanager
def serving(worker, root, **settings):
    settings = {"adapters": root, "api_key": KEY, "adapter_poll_s": 0.05} | settings
    with live_server(worker, **settings) as address:
        yield address


def test_the_start_removes_what_a_crash_left(worker, tmp_path):
    write_files(tmp_path / f"{PREFIX}{'0' * 32}", {"adapter_config.json": b"{"})
    client = open_client(worker, tmp_path)
    assert is_clean(tmp_path)
    assert client.get(ADMIN).json()["total"] == 0


# --- under load


def test_versions_are_replaced_under_load_and_each_answer_is_of_one_of_them(worker, tmp_path):
    versions = range(1, 6)
    prompts = ["hello", "some other words"]
    made = tmp_path / "made"
    expected = {}
    for version in versions:
        path = put(made, "task", str(version), version)
        for prompt in prompts:
            expected[f"task@{version}", prompt] = answer_alone(path, prompt)
    root = tmp_path / "dir"
    put(root, "task", "1", 1)
    done, told, wrong = threading.Event(), set(), []
    with serving(worker, root, max_queue=64) as address:

        def load(prompt):
            body = {"model": "task", "prompt": prompt, "max_tokens": 8, "temperature": 0}
            with httpx2.Client(headers=HEADERS, base_url=address, timeout=300) as client:
                while not done.is_set():
                    response = ask(client, **body)
                    reference = response.headers.get("x-adapter", "none")
                    text = response.json()["choices"][0]["text"]
                    told.add(reference)
                    if text != expected[reference, prompt]:
                        wrong.append((reference, prompt, text))

        threads = [threading.Thread(target=load, args=(prompt,)) for prompt in prompts * 3]
        for thread in threads:
            thread.start()
        try:
            for version in list(versions)[1:]:
                wait_for(lambda version=version: f"task@{version - 1}" in told)
                if version % 2:
                    shutil.copytree(made / "task" / str(version), root / "task" / str(version))
                    (root / "task" / "current").unlink(missing_ok=True)
                else:
                    body = make_tar(adapter_files(seed=version))
                    url = f"{address}{ADMIN}/task/{version}"
                    assert (
                        httpx2.put(url, content=body, headers=HEADERS, timeout=300).status_code
                        == 201
                    )
            wait_for(lambda: f"task@{versions[-1]}" in told)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert not wrong
    assert told == {f"task@{version}" for version in versions}


def test_many_requests_wait_for_one_loading(worker, tmp_path):
    put(tmp_path, "task", "1")
    with serving(worker, tmp_path) as address:
        found = []

        def one():
            with httpx2.Client(headers=HEADERS, base_url=address, timeout=300) as client:
                found.append(ask(client, model="task").headers["x-adapter"])

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = httpx2.get(f"{address}/metrics", headers=HEADERS, timeout=300).text
    assert found == ["task@1"] * 12
    assert "infmoe_adapter_loads_total 1.0" in metrics

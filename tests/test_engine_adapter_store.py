"""A directory of adapters: what is loaded, what never is, what is current, and when it changes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.adapter_folders import list_names, list_versions, natural_order
from engine.adapter_store import AdapterStore
from engine.adapter_upload import PREFIX, Upload, remove_leftovers, remove_version
from engine.adapters import describe_base
from engine.adapters_manifest import FILES, MANIFEST, write_manifest
from engine.errors import CheckpointError, EngineStopped, Overloaded, RequestError
from tests.adapter_folders import adapter_files, vectors, write_files
from tests.tiny import DENSE, tiny_model
from tests.waiting import wait_for

BASE = describe_base(tiny_model(DENSE))
ONE = vectors(3).nbytes
ROOT = Path(__file__).parents[1]


def open_store(root, limit_bytes=100 * ONE, settle_s=0.0, **how):
    store = AdapterStore(root, lambda: BASE, limit_bytes, settle_s=settle_s, **how)
    store.look()
    return store


def put(root, name, version, seed=0, **how):
    """A version with its manifest."""
    path = write_files(root / name / version, adapter_files(seed=seed, **how))
    write_manifest(path)
    return path


def version_of(store, reference):
    return store.resolve(reference).version


def states(store, name):
    return {info.version: info.state for info in store.tell(name)}


# --- what is current


def test_the_greatest_version_is_current_and_numbers_count_as_numbers(tmp_path):
    for number in ("v9", "v10", "v2"):
        put(tmp_path, "task", number, seed=int(number[1:]))
    store = open_store(tmp_path)
    adapter = store.resolve("task")
    assert (adapter.name, adapter.version, adapter.reference) == ("task", "v10", "task@v10")
    assert torch.equal(adapter.prompt_PD, vectors(3, 10))
    assert torch.equal(store.resolve("task@v2").prompt_PD, vectors(3, 2))
    assert states(store, "task") == {"v10": "resident", "v9": "discovered", "v2": "resident"}


def test_resident_are_those_in_memory(tmp_path):
    for name in ("two", "one", "never"):
        put(tmp_path, name, "1")
    store = open_store(tmp_path)
    assert store.resident() == []
    store.resolve("two")
    store.resolve("one")
    assert store.resident() == ["one@1", "two@1"]
    store.unload("two")
    assert store.resident() == ["one@1"]


def test_natural_order():
    names = ["1.10", "1.9", "2", "10", "beta", "1.x", "1"]
    assert sorted(names, key=natural_order) == ["1", "1.9", "1.10", "1.x", "2", "10", "beta"]


def test_the_pointer_wins_and_lasts(tmp_path):
    for number in range(3):
        put(tmp_path, "task", str(number), seed=number)
    store = open_store(tmp_path)
    assert version_of(store, "task") == "2"
    assert store.make_current("task", "0").is_current
    assert version_of(store, "task") == "0"
    put(tmp_path, "task", "7")
    store.look()
    assert version_of(store, "task") == "0"  # until somebody says otherwise
    assert version_of(open_store(tmp_path), "task") == "0"
    (tmp_path / "task" / "current").unlink()
    store.look()
    assert version_of(store, "task") == "7"


@pytest.mark.parametrize("text", ["9", "../1", "", "\0", "x" * 10_000])
def test_a_pointer_to_nothing_is_not_followed(tmp_path, text):
    put(tmp_path, "task", "1")
    (tmp_path / "task" / "current").write_text(text, encoding="utf-8")
    assert version_of(open_store(tmp_path), "task") == "1"


def test_rolling_back_to_what_cannot_be_served_changes_nothing(tmp_path):
    put(tmp_path, "task", "2")
    put(tmp_path, "task", "1", tensor=torch.full((3, 32), torch.nan))
    store = open_store(tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        store.make_current("task", "1")
    with pytest.raises(RequestError, match="no version '3'"):
        store.make_current("task", "3")
    assert version_of(store, "task") == "2"
    assert not (tmp_path / "task" / "current").exists()


def test_a_plain_folder_is_one_version_below_all_others(tmp_path):
    write_files(tmp_path / "task", adapter_files(seed=1))
    store = open_store(tmp_path)
    (info,) = store.tell("task")
    assert (info.version, info.state) == (None, "discovered")
    plain = store.resolve("task")
    assert store.resolve(plain.reference) is plain
    put(tmp_path, "task", "1", seed=2)
    store.look()
    assert version_of(store, "task") == "1"
    assert store.resolve(plain.reference) is plain
    store.make_current("task", plain.version)
    assert version_of(open_store(tmp_path), "task") == plain.version


# --- new, changed and gone


def test_a_new_version_replaces_the_old_one_at_the_next_look(tmp_path):
    put(tmp_path, "task", "1", seed=1)
    store = open_store(tmp_path)
    held = store.resolve("task")
    put(tmp_path, "task", "2", seed=2)
    store.look()  # reads it: no request waits
    assert store.find_resident("task").version == "2"
    assert torch.equal(held.prompt_PD, vectors(3, 1))


def test_names_that_come_between_looks_are_found(tmp_path):
    store = open_store(tmp_path)
    assert store.names() == []
    put(tmp_path, "task", "1")
    assert version_of(store, "task") == "1"
    assert store.has_name("task")


def test_what_is_removed_leaves_but_not_what_is_in_flight(tmp_path):
    put(tmp_path, "task", "1", seed=1)
    put(tmp_path, "task", "2", seed=2)
    store = open_store(tmp_path)
    held = store.resolve("task")
    shutil.rmtree(tmp_path / "task" / "2")
    store.look()
    assert version_of(store, "task") == "1"
    with pytest.raises(RequestError, match="no version '2'"):
        store.resolve("task@2")
    shutil.rmtree(tmp_path / "task")
    store.look()
    assert store.names() == []
    with pytest.raises(RequestError, match="'task' is not known"):
        store.resolve("task")
    assert store.find_resident("task") is None
    assert torch.equal(held.prompt_PD, vectors(3, 2))
    assert store.snapshot().used_bytes == ONE
    del held
    assert store.snapshot().used_bytes == 0


def test_a_plain_folder_that_is_replaced_has_a_new_version(tmp_path):
    write_files(tmp_path / "task", adapter_files(seed=1))
    store = open_store(tmp_path)
    first = store.resolve("task")
    write_files(tmp_path / "task", adapter_files(seed=2))
    store.look()
    second = store.find_resident("task")
    assert second.version != first.version
    assert torch.equal(second.prompt_PD, vectors(3, 2))
    with pytest.raises(RequestError, match="no version"):
        store.resolve(first.reference)


def test_a_version_never_changes(tmp_path):
    path = put(tmp_path, "task", "1", seed=1)
    store = open_store(tmp_path)
    store.resolve("task")
    write_files(path, adapter_files(seed=2))
    write_manifest(path)
    store.look()
    assert torch.equal(store.resolve("task").prompt_PD, vectors(3, 1))  # still in memory
    (info,) = store.tell("task")
    assert info.state == "failed"
    assert "is not what it was when version 1 was read" in info.reason
    store.unload("task")
    with pytest.raises(CheckpointError, match="another version"):
        store.resolve("task")


def test_a_look_at_a_directory_that_is_gone_raises(tmp_path):
    store = open_store(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(OSError, match="No such file"):
        store.look()


def test_a_folder_that_cannot_be_read_for_a_while_stays_as_it_is(tmp_path, monkeypatch):
    put(tmp_path, "task", "1")
    store = open_store(tmp_path)
    store.resolve("task")

    def fail(path, real=os.scandir):
        if Path(path).name == "task":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(os, "scandir", fail)
    store.look()
    assert store.find_resident("task").version == "1"
    assert states(store, "task") == {"1": "resident"}


def test_watching_finds_new_versions_and_ends_with_the_store(tmp_path):
    put(tmp_path, "task", "1")
    store = open_store(tmp_path)
    store.resolve("task")
    before = set(threading.enumerate())
    store.watch(0.01)
    (watcher,) = set(threading.enumerate()) - before
    put(tmp_path, "task", "2", seed=1)
    wait_for(lambda store=store: store.find_resident("task").version == "2")
    del store
    wait_for(lambda: not watcher.is_alive())


# --- half written, damaged, misfitting


def test_no_prefix_of_a_folder_with_a_manifest_is_ever_served(tmp_path):
    whole = put(tmp_path / "made", "task", "2", seed=2)
    put(tmp_path / "dir", "task", "1", seed=1)
    store = open_store(tmp_path / "dir")
    store.resolve("task")
    target = tmp_path / "dir" / "task" / "2"
    target.mkdir()
    for name in (MANIFEST, *FILES[:2]):  # the worst order
        data = (whole / name).read_bytes()
        for part in (data[: len(data) // 2], data):
            store.look()
            assert version_of(store, "task") == "1"
            (target / name).write_bytes(part)
    store.look()
    assert version_of(store, "task") == "2"


def test_a_plain_folder_is_not_read_before_it_has_settled(tmp_path):
    put(tmp_path, "task", "1", seed=1)
    store = open_store(tmp_path, settle_s=3600.0)
    store.resolve("task")
    write_files(tmp_path / "task" / "2", adapter_files(seed=2))
    for _ in range(3):
        store.look()
        assert version_of(store, "task") == "1"
    assert states(store, "task") == {"2": "discovered", "1": "resident"}


def test_a_request_for_an_unsettled_folder_waits_for_it(tmp_path):
    write_files(tmp_path / "task", adapter_files(seed=2))
    store = open_store(tmp_path, settle_s=0.1)
    start = time.monotonic()
    assert torch.equal(store.resolve("task").prompt_PD, vectors(3, 2))
    assert time.monotonic() - start >= 0.1


def test_a_folder_that_is_written_without_end_is_put_off(tmp_path, monkeypatch):
    path = write_files(tmp_path / "task", adapter_files(seed=2))
    store = open_store(tmp_path, settle_s=0.2)
    waits = []

    def write_meanwhile(wait_s):
        waits.append(wait_s)
        (path / "infmoe_adapter.json").write_text(" " * len(waits), encoding="utf-8")

    monkeypatch.setattr(time, "sleep", write_meanwhile)
    with pytest.raises(Overloaded, match="is being written") as caught:
        store.resolve("task")
    assert waits == [0.2]
    assert caught.value.retry_after_s == 0.2


CORRUPT = {
    "truncated": lambda path: os.truncate(path / FILES[1], 100),
    "one bit": lambda path: flip(path / FILES[1], -1),
    "header": lambda path: flip(path / FILES[1], 3),
    "config": lambda path: (path / FILES[0]).write_text("{"),
    "no config": lambda path: (path / FILES[0]).unlink(),
    "no vectors": lambda path: (path / FILES[1]).unlink(),
    "extra file": lambda path: (path / FILES[2]).write_text("{}"),
    "manifest": lambda path: (path / MANIFEST).write_text("{}"),
    "no json": lambda path: (path / MANIFEST).write_text("[" * 10_000),
    "huge config": lambda path: os.truncate(path / FILES[0], 2**21),
    "huge manifest": lambda path: os.truncate(path / MANIFEST, 2**21),
}


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", CORRUPT)
def test_a_damaged_version_fails_and_the_old_one_stays(tmp_path, how):
    put(tmp_path, "task", "1", seed=1)
    CORRUPT[how](put(tmp_path, "task", "2", seed=2))
    store = open_store(tmp_path)
    assert version_of(store, "task") == "1"
    assert states(store, "task") == {"2": "failed", "1": "resident"}
    with pytest.raises(CheckpointError):
        store.resolve("task@2")
    assert store.find_resident("task@2") is None
    assert store.snapshot().failures == 1  # what is known to be bad is not read again and again


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tensor": vectors(3, width=16)}, "shape"),
        ({"tensor": torch.full((3, 32), torch.inf)}, "NaN or infinite"),
        ({"count": 4 * DENSE.max_positions}, "allowed: 1 to"),
        ({"peft_type": "LORA"}, "expected PROMPT_TUNING"),
        ({"ours": {"base_fingerprint": "another"}}, "another base"),
        ({"ours": {"defaults": {"temperature": 3}}}, "defaults: temperature is 3; allowed"),
        ({"ours": {"defaults": {"max_tokens": True}}}, "max_tokens is True; expected a whole"),
        ({"ours": {"defaults": {"stop": [1]}}}, r"stop is \[1\]; expected a list of texts"),
        ({"ours": {"defaults": {"stop": [""]}}}, "none empty"),
        ({"ours": {"defaults": {"model": 1}}}, "unknown keys model"),
        ({"ours": {"defaults": []}}, r"defaults is \[\]; expected an object"),
        ({"count": 101}, "all adapters may take"),
    ],
)
def test_what_does_not_fit_is_not_served(tmp_path, how, message):
    put(tmp_path, "task", "1", **how)
    store = open_store(tmp_path, 33 * ONE)
    with pytest.raises(CheckpointError, match=message):
        store.resolve("task")
    (info,) = store.tell("task")
    assert info.state == "failed"
    assert info.reason
    with pytest.raises(CheckpointError, match=message):
        store.resolve("task@1")


def test_another_base_is_served_where_that_is_allowed(tmp_path):
    put(tmp_path, "task", "1", ours={"base_fingerprint": "another"})
    store = open_store(tmp_path, is_any_base_allowed=True)
    assert version_of(store, "task") == "1"


def test_defaults_are_on_the_adapter(tmp_path):
    defaults = {"temperature": 0.5, "stop": ["\n"], "max_tokens": 7}
    put(tmp_path, "task", "1", ours={"defaults": defaults})
    assert open_store(tmp_path).resolve("task").defaults == defaults


def test_a_pickle_is_refused_with_advice(tmp_path):
    files = adapter_files()
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    write_files(tmp_path / "task", files)
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        open_store(tmp_path).resolve("task")


def test_a_failure_is_mended_by_other_files(tmp_path):
    path = put(tmp_path, "task", "1", seed=1)
    flip(path / FILES[1], -1)
    store = open_store(tmp_path)
    with pytest.raises(CheckpointError):
        store.resolve("task")
    flip(path / FILES[1], -1)
    assert version_of(store, "task") == "1"
    assert states(store, "task") == {"1": "resident"}


def test_without_a_model_nothing_is_read(tmp_path):
    put(tmp_path, "task", "1")

    def describe():
        raise EngineStopped("the model is not loaded")

    store = AdapterStore(tmp_path, describe, ONE)
    store.look()
    with pytest.raises(EngineStopped):
        store.resolve("task")
    assert states(store, "task") == {"1": "discovered"}


# --- names and links

TRICKS = [
    *("..", ".", "", "/", "../x", "a/b", "a\\b", "a\0b", ".hidden", "-x", "a b", "\u0430dmin"),
    *("a" * 65, "a\n", "%2e%2e", "task@", "@1", "task@..", "task@../../x", "task@current", "C:"),
]


@pytest.mark.parametrize("name", TRICKS)
def test_names_that_play_tricks_are_not_known(tmp_path, name):
    put(tmp_path / "dir", "task", "1")
    put(tmp_path, "x", "1")
    (tmp_path / "dir" / "task" / "current").write_text("1", encoding="utf-8")
    store = open_store(tmp_path / "dir")
    with pytest.raises(RequestError):
        store.resolve(name)
    assert store.find_resident(name) is None
    wanted = {"name": name, "version": "1"}
    if "@" in name:
        wanted = dict(zip(("name", "version"), name.split("@"), strict=True))
    with pytest.raises(RequestError, match="is none; allowed"):
        Upload(tmp_path, **wanted)


def test_folders_with_other_names_are_not_listed(tmp_path):
    for name in ("ok", ".hidden", "-x", "a b", "\u0430dmin", "x" * 65):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert list(list_names(tmp_path)) == ["ok"]


def test_links_are_followed_inside_the_directory_only(tmp_path):
    root = tmp_path / "dir"
    outside = put(tmp_path / "other", "out", "1", seed=9)
    put(root, "real", "1", seed=1)
    (root / "link").symlink_to("real")
    (root / "out").symlink_to(outside.parent)
    (root / "real" / "2").symlink_to(outside)
    (root / "loop").symlink_to("loop")
    store = open_store(root)
    assert store.names() == ["link", "real"]
    assert version_of(store, "link") == version_of(store, "real") == "1"
    assert list(list_versions(root, "real")) == ["1"]
    with pytest.raises(RequestError):
        store.resolve("out")


def test_a_file_that_is_a_link_to_the_outside_is_not_read(tmp_path):
    path = put(tmp_path / "dir", "task", "1")
    secret = path / FILES[1]
    secret.rename(tmp_path / "secret")
    secret.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the directory"):
        open_store(tmp_path / "dir").resolve("task")


# --- memory


def test_states_from_discovered_to_evicted(tmp_path):
    for name in "abc":
        put(tmp_path, name, "1")
    store = open_store(tmp_path, 2 * ONE)
    for name in "abc":
        store.resolve(name)
    assert [states(store, name)["1"] for name in "abc"] == ["evicted", "resident", "resident"]
    before = store.snapshot()
    store.look()
    assert store.snapshot() == before  # what was evicted is not read again without need
    assert version_of(store, "a") == "1"
    assert states(store, "b") == {"1": "evicted"}
    info = store.find_info("a")
    assert (info.uses, info.nbytes, info.num_vectors) == (2, ONE, 3)
    assert info.last_used >= info.loaded_at > 0
    assert len(info.sha256) == 64
    held = store.snapshot()
    assert (held.names, held.resident, held.pinned, held.loads) == (3, 2, 0, 4)
    assert (held.used_bytes, held.limit_bytes) == (2 * ONE, 2 * ONE)


def test_pinned_ones_stay(tmp_path):
    for name in "abc":
        put(tmp_path, name, "1")
    store = open_store(tmp_path, 2 * ONE)
    assert store.pin("a").state == "pinned"
    for name in "bcb":
        store.resolve(name)
    assert [states(store, name)["1"] for name in "abc"] == ["pinned", "resident", "evicted"]
    store.pin("b")
    with pytest.raises(Overloaded, match="pinned"):
        store.resolve("c")
    assert store.snapshot().pinned == 2
    assert store.unpin("a").state == "resident"
    assert store.resolve("c").name == "c"
    assert states(store, "a") == {"1": "evicted"}
    assert store.unload("b").state == "evicted"
    assert store.unload("b").state == "evicted"
    for act in (store.unload, store.unpin, store.pin, store.load):
        with pytest.raises(RequestError):
            act("b@2")


def test_what_is_in_flight_is_not_evicted(tmp_path):
    for name in "abc":
        put(tmp_path, name, "1")
    store = open_store(tmp_path, 2 * ONE)
    held = [store.resolve("a"), store.resolve("b")]
    with pytest.raises(Overloaded, match="in flight"):
        store.resolve("c")
    del held
    assert version_of(store, "c") == "1"


def test_many_threads_want_one_adapter_and_it_is_read_once(tmp_path):
    put(tmp_path, "task", "1")
    store = open_store(tmp_path)
    gate, found = threading.Barrier(8), []

    def ask():
        gate.wait()
        found.append(store.resolve("task"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(adapter) for adapter in found}) == 1
    assert store.snapshot().loads == 1


def test_a_thousand_folders_are_listed_without_being_opened(tmp_path, monkeypatch):
    for number in range(1000):
        (tmp_path / f"task-{number}").mkdir()
    put(tmp_path, "task-5", "1")
    opened = []

    def scan(path, real=os.scandir):
        opened.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    store = open_store(tmp_path)
    assert len(store.names()) == 1000
    assert opened == [tmp_path.name]
    assert version_of(store, "task-5") == "1"
    store.look()
    assert set(opened) == {tmp_path.name, "task-5"}


# --- uploads


def send(store, name="task", version="1", files=None, piece=1000):
    with closing(Upload(store.root, name, version)) as upload:
        upload.open()
        for file_name, data in (adapter_files() if files is None else files).items():
            upload.begin(file_name)
            for start in range(0, len(data), piece):
                upload.write(data[start : start + piece])
        return upload.install(store)


def leftovers(root):
    return [path for path in root.iterdir() if path.name.startswith(PREFIX)]


def test_an_upload_becomes_a_version_once(tmp_path):
    store = open_store(tmp_path)
    assert send(store) == "new"
    assert version_of(store, "task") == "1"
    assert send(store) == "known"
    assert send(store, files=adapter_files(seed=1)) == "taken"
    assert torch.equal(store.resolve("task").prompt_PD, vectors(3))
    assert not leftovers(tmp_path)
    listed = json.loads((tmp_path / "task" / "1" / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, RequestError, "adapter_config.json is missing"),
        ({"adapter_config.json": b"{}"}, RequestError, "safetensors is missing"),
        ({"evil.py": b""}, RequestError, "'evil.py' is no file of an adapter"),
        ({"adapter_model.bin": b""}, RequestError, "is no file of an adapter"),
        (adapter_files(tensor=torch.full((3, 32), torch.nan)), CheckpointError, "NaN"),
        (
            {**adapter_files(), "manifest.json": b'{"files": {}}'},
            CheckpointError,
            "is not what manifest.json lists",
        ),
    ],
)
def test_a_bad_upload_leaves_nothing(tmp_path, files, error, message):
    store = open_store(tmp_path)
    with pytest.raises(error, match=message):
        send(store, files=files)
    assert not leftovers(tmp_path)
    assert not (tmp_path / "task").exists()


def test_a_file_comes_once(tmp_path):
    with closing(Upload(tmp_path, "task", "1")) as upload:
        upload.open()
        upload.begin(FILES[0])
        with pytest.raises(RequestError, match="comes twice"):
            upload.begin(FILES[0])


def test_the_manifest_of_the_sender_is_checked(tmp_path):
    made = put(tmp_path / "made", "task", "1")
    files = {name: (made / name).read_bytes() for name in (*FILES[:2], MANIFEST)}
    (tmp_path / "dir").mkdir()
    assert send(open_store(tmp_path / "dir"), files=files) == "new"


def test_leftovers_of_a_crash_go_but_not_the_work_of_others(tmp_path):
    write_files(tmp_path / f"{PREFIX}dead", adapter_files())
    with closing(Upload(tmp_path, "task", "1")) as upload:
        upload.open()
        assert remove_leftovers(tmp_path) == 0
        assert len(leftovers(tmp_path)) == 2
    assert remove_leftovers(tmp_path) == 1
    assert remove_leftovers(tmp_path) == 0
    assert not leftovers(tmp_path)


KILLED = """
import sys
from pathlib import Path
from engine.adapter_upload import Upload
root = Path(sys.argv[1])
upload = Upload(root, "task", "2")
upload.open()
upload.begin("adapter_config.json")
upload.write(b"{")
print("writing", flush=True)
sys.stdin.read()
"""


def test_a_kill_in_the_middle_of_an_upload_leaves_the_old_version(tmp_path):
    put(tmp_path, "task", "1", seed=1)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        assert remove_leftovers(tmp_path) == 0  # it is at work
        process.kill()
        process.wait()
    assert len(leftovers(tmp_path)) == 1
    store = open_store(tmp_path)
    assert store.names() == ["task"]
    assert version_of(store, "task") == "1"
    assert remove_leftovers(tmp_path) == 1
    assert send(store, version="2", files=adapter_files(seed=2)) == "new"
    store.look()
    assert version_of(store, "task") == "2"


def test_versions_are_deleted_one_by_one_or_all(tmp_path):
    for number in (1, 2, 3):
        put(tmp_path, "task", str(number), seed=number)
    store = open_store(tmp_path)
    store.make_current("task", "3")
    held = store.resolve("task")
    remove_version(store, "task", "3")
    assert not (tmp_path / "task" / "current").exists()
    assert version_of(store, "task") == "2"
    assert held.version == "3"
    with pytest.raises(RequestError, match="no version '3'"):
        remove_version(store, "task", "3")
    remove_version(store, "task", None)
    assert store.names() == []
    assert not leftovers(tmp_path)
    with pytest.raises(RequestError, match="not known"):
        remove_version(store, "task", None)


def test_a_plain_folder_is_deleted_by_its_version(tmp_path):
    write_files(tmp_path / "task", adapter_files())
    store = open_store(tmp_path)
    version = version_of(store, "task")
    put(tmp_path, "task", "1")
    remove_version(store, "task", version)
    assert states(store, "task") == {"1": "resident"}
    write_files(tmp_path / "other", adapter_files())
    remove_version(store, "other", version_of(store, "other"))
    assert not (tmp_path / "other").exists()


def test_a_version_that_was_deleted_may_come_again_with_other_vectors(tmp_path):
    store = open_store(tmp_path)
    send(store)
    store.resolve("task")
    remove_version(store, "task", "1")
    assert send(store, files=adapter_files(seed=1)) == "new"
    assert torch.equal(store.resolve("task").prompt_PD, vectors(3, 1))

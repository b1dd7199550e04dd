"""Pins of adapters that last: which file holds them, and what is made of one that is not ours."""

import errno
import json
import os
import shutil
from contextlib import contextmanager

import pytest

from engine import adapter_pins
from engine.adapter_pins import MAX_BYTES, PINS, AdapterPins, read_pins
from engine.adapter_store import AdapterStore
from engine.adapter_upload import remove_version
from engine.adapters_manifest import write_manifest
from engine.errors import EngineStopped, RequestError
from tests.adapter_folders import adapter_files, write_files
from tests.test_engine_adapter_store import BASE, ONE, flip, open_store, put, states


def test_pins_are_read_by_who_comes_next_and_written_whole(tmp_path):
    first, second = AdapterPins(tmp_path), AdapterPins(tmp_path)
    assert first.wanted() == second.wanted() == []
    first.add("b@1")
    first.add("a@v2")
    second.add("c@1")  # knows nothing of the others, and loses none
    assert read_pins(tmp_path) == {"a@v2", "b@1", "c@1"}
    assert (first.wanted(), second.wanted()) == (["a@v2", "b@1"], ["c@1"])
    second.discard("a@v2")
    second.discard("nobody@1")
    assert AdapterPins(tmp_path).wanted() == ["b@1", "c@1"]
    assert first.has("a@v2")  # it is pinned in that process
    assert json.loads((tmp_path / PINS).read_text()) == {"format": 1, "pins": ["b@1", "c@1"]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\0",
        b"[" * 100_000,
        b"[]",
        b'{"format": 2, "pins": []}',
        b'{"format": 1}',
        b'{"format": 1, "pins": {"a@1": true}}',
        b'{"format": 1, "pins": ["a@1", 5]}',
        b'{"format": 1, "pins": ["a"]}',
        b'{"format": 1, "pins": ["../a@1"]}',
        b'{"format": 1, "pins": ["a@current"]}',
        b" " * (MAX_BYTES + 1),
        None,
    ],
)
def test_a_file_that_is_none_of_ours_pins_nothing_and_says_so(tmp_path, caplog, content):
    put(tmp_path, "a", "1")
    if content is None:
        (tmp_path / PINS).mkdir()
    else:
        (tmp_path / PINS).write_bytes(content)
    store = open_store(tmp_path)
    store.look()
    assert store.snapshot().pinned == 0
    assert caplog.text.count("is no list of pinned adapters") == 1
    if content is not None:
        assert (tmp_path / PINS).read_bytes() == content
        store.pin("a")
        assert open_store(tmp_path).snapshot().pinned == 1


@contextmanager
def failing(monkeypatch, number):
    def write(path, data):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(adapter_pins, "write_file", write)
        yield


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_in_a_directory_that_may_not_be_written_pins_last_as_long_as_the_process(
    tmp_path, monkeypatch, caplog, number
):
    put(tmp_path, "a", "1")
    store = open_store(tmp_path)
    with failing(monkeypatch, number):
        assert store.pin("a").state == "pinned"
        assert "is forgotten at the end of this process" in caplog.text
        assert store.unpin("a").state == "resident"
        store.pin("a")
    assert open_store(tmp_path).snapshot().pinned == 0


def test_on_a_full_disk_nothing_is_pinned_and_nothing_unpinned(tmp_path, monkeypatch):
    for name in "ab":
        put(tmp_path, name, "1")
    store = open_store(tmp_path)
    store.pin("b")
    with failing(monkeypatch, errno.ENOSPC):
        for act, name in ((store.pin, "a"), (store.unpin, "b"), (store.unload, "b")):
            with pytest.raises(OSError, match="No space left"):
                act(name)
    assert (states(store, "a"), states(store, "b")) == ({"1": "resident"}, {"1": "pinned"})


def test_pins_survive_a_restart_once_there_is_a_model(tmp_path):
    for name in "abcd":
        put(tmp_path, name, "1", seed=ord(name))
    put(tmp_path, "a", "2")
    before = open_store(tmp_path)
    for reference in ("a@1", "b", "c", "d"):
        before.pin(reference)
    before.unpin("c")
    before.unload("d")

    model = []

    def describe():
        if not model:
            raise EngineStopped("the model is not loaded")
        return BASE

    store = AdapterStore(tmp_path, describe, 3 * ONE, settle_s=0.0)
    store.look()
    assert store.snapshot().pinned == 0
    model.append(BASE)
    store.look()
    store.look()
    assert (store.resident(), store.snapshot().loads) == (["a@1", "b@1"], 2)
    assert states(store, "a") == {"2": "discovered", "1": "pinned"}
    for reference in ("c", "d", "a"):  # those that are pinned stay, and c, d and a@2 take turns
        store.resolve(reference)
    assert store.resident() == ["a@1", "a@2", "b@1"]
    assert store.unpin("b").state == "resident"
    assert open_store(tmp_path).resident() == ["a@1"]


def test_a_plain_folder_is_pinned_again_as_long_as_it_is_the_same(tmp_path, caplog):
    path = write_files(tmp_path / "task", adapter_files(seed=1))
    pinned = open_store(tmp_path).pin("task")
    assert open_store(tmp_path).resident() == [f"task@{pinned.version}"]
    shutil.rmtree(path)
    write_files(path, adapter_files(seed=2))
    store = open_store(tmp_path)
    assert store.snapshot().pinned == 0
    assert f"adapter task@{pinned.version} cannot be pinned again" in caplog.text


@pytest.mark.parametrize("how", ["by an administrator", "by hand", "all versions", "while down"])
def test_the_pin_of_what_is_removed_is_forgotten(tmp_path, caplog, how):
    for version in "12":
        put(tmp_path, "task", version)
    store = open_store(tmp_path)
    store.pin("task@1")
    if how == "by an administrator":
        remove_version(store, "task", "1")
    elif how == "all versions":
        remove_version(store, "task", None)
    else:
        shutil.rmtree(tmp_path / "task" / "1")
        store = open_store(tmp_path) if how == "while down" else store
    store.look()
    assert read_pins(tmp_path) == set()
    assert caplog.text.count("adapter task@1 was pinned and is gone") == 1
    put(tmp_path, "task", "1")
    store.look()
    assert store.snapshot().pinned == 0
    with pytest.raises(RequestError):
        store.unpin("nobody")


def test_what_cannot_be_served_is_pinned_again_when_it_is_mended(tmp_path, caplog):
    path = put(tmp_path, "task", "1", seed=1)
    open_store(tmp_path).pin("task")
    flip(path / "adapter_model.safetensors", -1)
    store = open_store(tmp_path)
    store.look()
    assert (store.snapshot().pinned, caplog.text.count("cannot be pinned again")) == (0, 1)
    assert read_pins(tmp_path) == {"task@1"}
    flip(path / "adapter_model.safetensors", -1)
    write_manifest(path)
    store.look()
    assert store.snapshot().pinned == 1


def test_pins_for_which_there_is_no_room_any_more_are_told_once(tmp_path, caplog):
    for name in "ab":
        put(tmp_path, name, "1")
        open_store(tmp_path).pin(name)
    store = open_store(tmp_path, ONE)
    for _ in range(3):
        store.look()
    assert store.resident() == ["a@1"]
    assert caplog.text.count("adapter b@1 cannot be pinned again") == 1
    assert read_pins(tmp_path) == {"a@1", "b@1"}

"""Keys: made once, kept as hashes, read again when their file changes."""

import json
import logging
import threading
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from engine.errors import ConfigError
from server.__main__ import build_app
from server.keys import (
    MAX_FILE_BYTES,
    MAX_KEYS,
    KeyStore,
    changing_keys,
    hash_key,
    new_key,
    parse_keys,
    read_keys,
    write_keys,
)
from server.schemas_keys import SCOPES, KeyRecord


def keys(*arguments):
    return CliRunner().invoke(build_app("keys"), ["keys", *map(str, arguments)])


def record(name="alice", key="k", **values):
    return KeyRecord(name=name, sha256=hash_key(key), **values)


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def test_keys_are_long_and_differ():
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("infmoe-") and len(key) == 50 and key.isascii() for key in made)


def test_add_prints_the_key_once_and_keeps_its_hash(tmp_path):
    path = tmp_path / "keys"
    result = keys("add", path, "--name", "alice", "--scope", "infer", "--scope", "admin")
    key = result.stdout.strip()
    assert result.exit_code == 0
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    (kept,) = read_keys(path)
    assert (kept.name, kept.sha256, kept.scopes) == ("alice", hash_key(key), ("infer", "admin"))
    assert [file.name for file in tmp_path.iterdir()] == ["keys"]


def test_add_takes_limits(tmp_path):
    path = tmp_path / "keys"
    limits = ["--requests-per-minute", 5, "--tokens-per-minute", 6, "--max-concurrent", 7]
    rest = ["--adapter", "a*", "--adapter", "b", "--priority", 3, "--days", 2]
    keys("add", path, "--name", "bob", *limits, *rest)
    (kept,) = read_keys(path)
    assert (kept.requests_per_minute, kept.tokens_per_minute, kept.max_concurrent) == (5, 6, 7)
    assert (kept.adapters, kept.priority) == (("a*", "b"), 3)
    assert timedelta(days=1.9) < kept.expires - datetime.now(UTC) <= timedelta(days=2)


def test_list_shows_no_hash(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, [record("alice"), record("bob", "other", priority=2)])
    lines = [json.loads(line) for line in keys("list", path).stdout.splitlines()]
    assert [line["name"] for line in lines] == ["alice", "bob"]
    assert not any("sha256" in line for line in lines)


def test_revoke_takes_one_key_out(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, [record("alice"), record("bob", "other")])
    assert keys("revoke", path, "--name", "alice").exit_code == 0
    assert [kept.name for kept in read_keys(path)] == ["bob"]
    failed = keys("revoke", path, "--name", "alice")
    assert "has no key named alice; it has bob" in str(failed.exception)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--name", "alice"], "has a key named alice; revoke it first"),
        (["--name", "a b"], "no such key can be made: name"),
        (["--name", "default"], "INFMOE_API_KEY"),
        (["--name", "b", "--scope", "root"], r"no such key can be made: scopes\.0"),
        (["--name", "b", "--adapter", "a*b"], r"no such key can be made: adapters\.0"),
    ],
)
def test_keys_that_cannot_be_made(tmp_path, options, reason):
    path = tmp_path / "keys"
    write_keys(path, [record("alice")])
    with pytest.raises(ConfigError, match=reason):
        raise keys("add", path, *options).exception
    assert len(read_keys(path)) == 1


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "keys"

    def add(number):
        with changing_keys(path) as records:
            records.append(record(f"key{number}", str(number)))

    threads = [threading.Thread(target=add, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path)) == 8


def test_a_change_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, [record("alice")])
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_keys(path, [record("bob"), None])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["keys"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "keys")
    with changing_keys(tmp_path / "link") as records:
        records.append(record())
    assert (tmp_path / "link").is_symlink()
    assert len(read_keys(tmp_path / "keys")) == 1


HASH = "0" * 64


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: it: Invalid JSON"),
        ("[]", "line 1: it: "),
        ('{"name": "a"}', "line 1: sha256: Field required"),
        (f'{{"name": "a", "sha256": "{HASH[1:]}"}}', "line 1: sha256"),
        (f'{{"name": "a", "sha256": "{HASH}", "scope": []}}', "line 1: scope: Extra"),
        (f'{{"name": "a", "sha256": "{HASH}", "scopes": []}}', "line 1: scopes"),
        (f'{{"name": "a", "sha256": "{HASH}", "priority": true}}', "line 1: priority"),
        (f'{{"name": "a", "sha256": "{HASH}", "expires": "2030-01-01T00:00:00"}}', "timezone"),
    ],
)
def test_lines_that_are_wrong(line, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_keys(line)
    assert HASH not in str(caught.value)


def test_files_that_are_wrong(tmp_path):
    path = tmp_path / "keys"
    line = record().model_dump_json()
    with pytest.raises(ConfigError, match=r"keys: No such file"):
        read_keys(path)
    path.write_text(f"{line}\n\n{line}\n")
    with pytest.raises(ConfigError, match="line 3: there are two keys named alice"):
        read_keys(path)
    path.write_text("".join(f"{record(f'k{i}').model_dump_json()}\n" for i in range(MAX_KEYS + 1)))
    with pytest.raises(ConfigError, match=f"a file takes up to {MAX_KEYS}"):
        read_keys(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="keys file"):
        read_keys(path)
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="is it a keys file"):
        read_keys(path)


def test_a_store_finds_keys_by_their_hash(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, [record("alice", "first"), record("bob", "second")])
    store = KeyStore(path)
    assert [store.find(key).name for key in ("first", "second")] == ["alice", "bob"]
    assert store.find("third") is None
    assert store.find(hash_key("first")) is None  # the hash opens nothing
    assert store.find("\ud800\xff") is None


def test_the_key_of_the_settings_may_do_all(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, [record("alice", "first")])
    store = KeyStore(path, SecretStr("single"))
    assert store.find("single").scopes == SCOPES
    assert store.find("first").name == "alice"
    write_keys(path, [record("default", "first")])
    with pytest.raises(ConfigError, match="the name default is taken"):
        KeyStore(path, SecretStr("single"))


def test_a_store_without_a_file_that_can_be_read_does_not_start(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        KeyStore(tmp_path / "none")


def test_a_changed_file_is_read_again_within_a_second(tmp_path, caplog):
    path, clock = tmp_path / "keys", Clock()
    write_keys(path, [record("alice", "first")])
    store = KeyStore(path, clock=clock)
    write_keys(path, [record("bob", "second")])
    clock.now_s = 0.9
    assert store.find("first") is not None  # not looked yet
    clock.now_s = 1.1
    with caplog.at_level(logging.INFO):
        assert store.find("first") is None
    assert store.find("second").name == "bob"
    assert "1 keys read anew" in caplog.text


@pytest.mark.parametrize("content", [b"{broken", None])
def test_a_broken_file_keeps_the_old_keys(tmp_path, caplog, content):
    path, clock = tmp_path / "keys", Clock()
    write_keys(path, [record("alice", "first")])
    store = KeyStore(path, clock=clock)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    clock.now_s = 2.0
    assert store.find("first").name == "alice"
    assert "the keys stay as they were" in caplog.text
    clock.now_s = 4.0
    store.find("first")
    assert len(caplog.records) == 1  # told once
    write_keys(path, [record("bob", "second")])
    clock.now_s = 6.0
    assert store.find("second").name == "bob"


def test_adapters_by_name_and_pattern():
    some = record(adapters=("law-*", "news", "tax@v2"))
    assert all(map(some.may_use_adapter, ("law-de", "law-de@3", "news", "news@1", "tax@v2")))
    assert not any(map(some.may_use_adapter, ("law", "new", "newss", "tax", "tax@v1", "")))
    assert record().may_use_adapter("anything")
    assert record(adapters=("*",)).may_use_adapter("anything")
    assert not record(adapters=()).may_use_adapter("anything")


def test_expiry():
    now = datetime.now(UTC)
    assert record(expires=now - timedelta(seconds=1)).has_expired()
    assert not record(expires=now + timedelta(hours=1)).has_expired()
    assert not record().has_expired()

"""Settings: flags over environment over file over defaults; nothing unknown, no secret shown."""

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from server.settings import Settings, is_loopback
from server.settings_sources import (
    MAX_CONFIG_BYTES,
    join_settings,
    parse_assignments,
    print_settings,
    read_settings,
)
from server.toml import write_value

SECRET = "a-key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("INFMOE_")]:
        monkeypatch.delenv(name)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path, monkeypatch):
    config = write(tmp_path / "c.toml", "port = 1\nmax_rows = 2\nmax_queue = 3\n")
    monkeypatch.setenv("INFMOE_PORT", "10")
    monkeypatch.setenv("INFMOE_MAX_ROWS", "20")
    settings, origins = join_settings({"port": 100, "host": None}, config)
    found = (settings.port, settings.max_rows, settings.max_queue, settings.host)
    assert found == (100, 20, 3, "127.0.0.1")
    assert origins == {"port": "--port", "max_rows": "INFMOE_MAX_ROWS", "max_queue": str(config)}


def test_the_file_may_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("INFMOE_CONFIG", str(write(tmp_path / "c.toml", "port = 1")))
    assert read_settings().port == 1
    other = write(tmp_path / "d.toml", "port = 2")
    assert join_settings({}, other)[0].port == 2


def test_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("INFMOE_PORT", "9000")
    monkeypatch.setenv("INFMOE_MAX_QUEUE", "70")
    monkeypatch.setenv("INFMOE_MEMORY", "24GiB")
    monkeypatch.setenv("INFMOE_GPU_MEMORY", "16 GiB")
    monkeypatch.setenv("infmoe_strict_fields", "true")
    monkeypatch.setenv("INFMOE_CORS_ORIGINS", "https://a.example, http://b:3000")
    settings = read_settings(port=9001, host=None)
    assert (settings.port, settings.max_queue, settings.host) == (9001, 70, "127.0.0.1")
    assert (settings.memory, settings.gpu_memory) == (24 * 2**30, 16 * 2**30)
    assert settings.strict_fields
    assert settings.cors_origins == ("https://a.example", "http://b:3000")


@pytest.mark.parametrize(
    ("name", "near"), [("INFMOE_PROT", "INFMOE_PORT"), ("INFMOE_API_KEYS_FILE", "API_KEY_FILE")]
)
def test_misspelt_variable_is_refused(monkeypatch, name, near):
    monkeypatch.setenv(name, "9000")
    with pytest.raises(ConfigError, match=f"unknown setting {name}; did you mean .*{near}"):
        read_settings()


def test_misspelt_name_in_the_file_is_refused(tmp_path):
    config = write(tmp_path / "c.toml", "prot = 1")
    with pytest.raises(ConfigError, match=r"c\.toml: unknown setting prot; did you mean port\?"):
        join_settings({}, config)


def test_misspelt_flag_is_refused():
    with pytest.raises(ConfigError, match="unknown setting drains; did you mean drain_s"):
        read_settings(drains=1)
    with pytest.raises(ConfigError, match="unknown setting drain_sec; did you mean drain_s"):
        parse_assignments(["drain-sec=1"])


def test_assignments():
    assert parse_assignments(["drain-s=1", "keys_file=a=b"]) == {"drain_s": "1", "keys_file": "a=b"}
    with pytest.raises(ConfigError, match="write --set NAME=VALUE"):
        parse_assignments(["drain_s"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("port = ", "is not TOML"),
        ("port = true", "setting port: true and false"),
        ("[serve]\nport = 1", "unknown setting serve"),
        ('port = "many"', r"setting port \(from .*c\.toml\)"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        join_settings({}, write(tmp_path / "c.toml", text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        join_settings({}, tmp_path / "none.toml")
    large = write(tmp_path / "large.toml", "#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        join_settings({}, large)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        join_settings({}, tmp_path / "binary.toml")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_from_a_file(tmp_path, monkeypatch, end):
    (tmp_path / "key").write_bytes(f"{SECRET}{end}".encode())
    monkeypatch.setenv("INFMOE_API_KEY_FILE", str(tmp_path / "key"))
    assert read_settings().api_key.get_secret_value() == SECRET


def test_a_secret_given_twice_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("INFMOE_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"INFMOE_API_KEY_FILE: .* No such file"):
        read_settings()
    (tmp_path / "none").write_bytes(b"\xff" * 20)
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_settings()
    monkeypatch.setenv("INFMOE_API_KEY", SECRET)
    with pytest.raises(ConfigError, match="are both set"):
        read_settings()


@pytest.mark.parametrize(
    "key", ["", "short", "with spaces in the midst", "clé" * 8, "a" * 20 + "\n"]
)
def test_a_key_that_is_guessed_or_cannot_be_sent(key):
    with pytest.raises(ConfigError, match="at least 16 characters") as caught:
        read_settings(api_key=key)
    assert len(key) < 6 or key not in str(caught.value)


@pytest.mark.parametrize("origin", ["*", "null", "https://a.example/", "a.example", "ftp://a", ""])
def test_origins_are_listed_one_by_one(origin):
    if not origin:
        assert read_settings(cors_origins=origin).cors_origins == ()
        return
    with pytest.raises(ConfigError, match="is no origin"):
        read_settings(cors_origins=origin)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 70_000}, r"setting port \(from --port\)"),
        ({"drain_s": float("inf")}, "setting drain_s"),
        ({"drain_s": "nan"}, "setting drain_s"),
        ({"log_level": "loud"}, "setting log_level"),
        ({"memory": "lots"}, "setting memory .*: 'lots' is no size in bytes"),
        ({"gpu_memory": "-1"}, "setting gpu_memory .*: '-1' is no size in bytes"),
        ({"max_queue": 2, "max_choices": 3}, "max_choices 3 exceeds max_queue 2"),
    ],
)
def test_settings_out_of_bounds(options, text):
    with pytest.raises(ConfigError, match=text):
        read_settings(**options)


def test_printed_settings_mask_secrets_and_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("INFMOE_API_KEY", SECRET)
    options = {"port": 7, "memory": "1GiB", "model": tmp_path / "ein Modell \u6a21"}
    settings, origins = join_settings({**options, "cors_origins": "https://a.example"})
    text = print_settings(settings, origins)
    assert SECRET not in text
    assert '# api_key = "********"  # INFMOE_API_KEY' in text
    assert "port = 7  # --port" in text
    assert "max_rows = 32  # default" in text
    assert "# gpu_memory is not set" in text
    assert all(name in text for name in Settings.model_fields)
    again, _ = join_settings({}, write(tmp_path / "c.toml", text))
    assert again == settings


def test_a_secret_is_not_in_the_representation():
    assert SECRET not in repr(read_settings(api_key=SECRET))


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3),
    max_leaves=5,
)


@given(VALUES)
def test_values_are_spelt_as_toml_reads_them(value):
    assert tomllib.loads(f"a = {write_value(value)}")["a"] == value


def test_values_of_other_kinds_are_not_spelt():
    assert write_value(Path("a/b")) == '"a/b"'
    with pytest.raises(TypeError, match="no setting is a dict"):
        write_value({})


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    others = ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org")
    assert not any(is_loopback(host) for host in others)


def test_default_settings_listen_on_this_machine_only():
    assert is_loopback(Settings().host)


def test_an_open_address_needs_a_key_or_consent(tmp_path):
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached .*--allow-unauthenticated"):
        read_settings(host="0.0.0.0").require_safe()
    read_settings().require_safe()
    read_settings(host="0.0.0.0", allow_unauthenticated=True).require_safe()
    read_settings(host="0.0.0.0", api_key=SECRET).require_safe()
    read_settings(host="0.0.0.0", keys_file=tmp_path / "keys").require_safe()


def test_a_name_like_no_other_is_not_guessed_at(monkeypatch):
    monkeypatch.setenv("INFMOE_XYZZY", "1")
    with pytest.raises(
        ConfigError, match="unknown setting INFMOE_XYZZY; `infmoe serve --print-config`"
    ):
        read_settings()


@pytest.mark.parametrize(
    ("text", "is_own"),
    [
        ("", True),
        ('memory = "2GiB"', False),
        ('memory = "2GiB"\nengine_process = true', True),
        ("engine_process = false", False),
    ],
)
def test_the_engine_has_a_process_unless_memory_is_bounded_or_somebody_says_so(
    tmp_path, text, is_own
):
    settings, _ = join_settings({}, write(tmp_path / "c.toml", text))
    assert settings.has_engine_process is is_own

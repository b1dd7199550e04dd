"""The `infmoe` command, settings, and the life of a server process."""

import asyncio
import contextlib
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import httpx2
import pytest
import torch
from typer.testing import CliRunner

from engine.adapters import model_fingerprint
from engine.checkpoint import save_model
from engine.errors import PromptTooLong
from engine.planning import CACHES, WORKSPACE
from engine.prompt import build_request
from engine.request import Finished, SamplingParams
from offload.trace import load_trace
from server.__main__ import COMMANDS, build_app, load, main, not_chosen
from server.cli import greeting, open_engine
from server.lifecycle import open_socket
from server.settings_sources import read_settings
from tests.tiny import LLAMA, tiny_model
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent


def infmoe(*arguments, **options):
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = infmoe("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 5  # 0.2 s on a quiet machine


def test_help_imports_nothing_heavy():
    code = """
        import sys
        from server.__main__ import main
        try:
            main(["--help"])
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "fastapi", "transformers", "numpy", "uvicorn", "pydantic"}
        print(sorted(heavy & set(sys.modules)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_command_shows_help():
    result = CliRunner().invoke(build_app(None), [])
    assert result.exit_code == 2
    assert "serve" in result.output


@pytest.mark.parametrize("arguments", [["nothing"], ["serve", "--nothing"], ["--nothing"]])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["serve", "x", "--port", "70000"],
        ["serve", "x", "--dtype", "int3"],
        ["serve", "x", "--log-level", "loud"],
    ],
)
def test_wrong_usage_of_serve(arguments, capsys, monkeypatch):
    monkeypatch.delenv("INFMOE_MODEL", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_loaded(name):
    function = load(COMMANDS[name])
    assert function.__doc__
    result = CliRunner().invoke(build_app(name), [name, "--help"])
    assert result.exit_code == 0


def test_only_the_chosen_command_is_loaded():
    with pytest.raises(AssertionError, match="without being imported"):
        not_chosen()


def failing(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("infmoe: error: ")
    return line


def test_missing_model_is_one_line(capsys, tmp_path):
    assert "is not a directory" in failing(capsys, ["serve", str(tmp_path / "none")])


@pytest.mark.parametrize("name", ["", "none/trace.npz"])
def test_a_trace_that_cannot_be_written_is_told_before_loading(capsys, tmp_path, name):
    trace = str(tmp_path / name)
    told = failing(capsys, ["serve", str(tmp_path), "--record-routing", trace])
    assert f"{trace}: the routing cannot be written there" in told


def test_wrong_setting_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("INFMOE_PORT", "many")
    assert "port" in failing(capsys, ["serve", str(tmp_path)])


def test_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = infmoe("serve", str(tmp_path), "--port", str(port))
    assert result.returncode == 1
    expected = f"infmoe: error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert result.stderr.splitlines() == [expected]


def test_model_that_cannot_be_loaded_ends_the_process(tmp_path):
    open_to_all = ["--host", "0.0.0.0", "--allow-unauthenticated"]
    result = infmoe("serve", str(tmp_path), *open_to_all, "--port", "0")
    assert result.returncode == 1
    assert result.stdout == ""
    warning, address, *_, last = result.stderr.splitlines()
    assert "listening on 0.0.0.0 without authentication" in warning
    assert address.startswith("infmoe: listening on http://0.0.0.0:")
    assert last.startswith("infmoe: error: the engine has ended: ")
    assert "Traceback" not in result.stderr


def test_an_open_address_without_a_key_is_one_line(capsys, tmp_path):
    told = failing(capsys, ["serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"])
    assert "0.0.0.0 can be reached from other machines and no key is set" in told


def test_a_keys_file_that_is_wrong_is_told_before_loading(capsys, tmp_path):
    keys = tmp_path / "keys"
    told = failing(capsys, ["serve", str(tmp_path), "--keys-file", str(keys)])
    assert f"keys file {keys}: No such file or directory" in told
    keys.write_text("nonsense")
    told = failing(capsys, ["serve", str(tmp_path), "--keys-file", str(keys)])
    assert f"keys file {keys}: line 1: " in told


def test_print_config_needs_no_model_and_exits_0(capsys, monkeypatch):
    monkeypatch.setenv("INFMOE_API_KEY", "a-secret-of-many-letters")
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--print-config", "--port", "7", "--set", "drain-s=4", "--set", "stall_s=9"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    table = tomllib.loads(printed)
    assert (table["port"], table["drain_s"], table["stall_s"]) == (7, 4.0, 9.0)
    assert "a-secret" not in printed
    assert '# api_key = "********"  # INFMOE_API_KEY' in printed


def test_config_file_that_is_wrong_is_one_line(capsys, tmp_path):
    (tmp_path / "c.toml").write_text("max_row = 1")
    told = failing(capsys, ["serve", str(tmp_path), "--config", str(tmp_path / "c.toml")])
    assert "c.toml: unknown setting max_row; did you mean max_rows?" in told
    assert "did you mean max_rows" in failing(capsys, ["serve", "--set", "max_row=1"])


def test_keys_are_a_group_of_commands(tmp_path):
    result = CliRunner().invoke(build_app("keys"), ["keys"])
    assert all(name in result.output for name in ("add", "list", "revoke"))


def test_unknown_host_is_one_line():
    with pytest.raises(OSError, match=r"^cannot listen on no\.such\.host\.invalid port 1: "):
        open_socket("no.such.host.invalid", 1)


def test_greeting_is_one_line_with_a_sample():
    with open_socket("127.0.0.1", 0) as listener:
        text = greeting(listener)
        port = listener.getsockname()[1]
    assert "\n" not in text
    assert f"listening on http://127.0.0.1:{port};" in text
    assert f"curl http://127.0.0.1:{port}/v1/completions" in text


def test_greeting_of_ipv6():
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(open_socket("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        assert "http://[::1]:" in greeting(listener)


SERVER = """
    import os
    import sys
    import threading
    from engine.request import Piece
    from server.app import create_app
    from server.lifecycle import open_socket, run, run_to_exit
    from server.settings import Settings
    from tests.fakes import HOLD, FakeEngine, finished

    class Engine(FakeEngine):
        def compute(self, big):
            while True:
                big @ big

        def drain(self, timeout_s):
            if sys.argv[1] == "busy":  # as an engine does that has much left to compute
                self.state = "draining"
                return not threading.Event().wait(timeout_s)
            if sys.argv[1] == "finish":
                self.release()
            if sys.argv[1] == "told":  # when the time is over is told, so that there is enough
                self.state = "draining"
                os.read(0, 1)
            return super().drain(timeout_s)

        def submit(self, request):
            if sys.argv[1] == "fail":
                self.state, self.failure = "failed", "out of memory"
            return super().submit(request)

    engine = Engine(lambda request: [Piece("a", (1,)), HOLD, finished(request)])
    if sys.argv[1] == "busy":
        import torch
        threading.Thread(target=engine.compute, args=[torch.ones(400, 400)], daemon=True).start()
        run = run_to_exit
    listener = open_socket("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    try:
        run(create_app(engine, Settings()), engine, listener, float(sys.argv[2]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@contextlib.contextmanager
def server_process(mode, drain_s):
    command = [sys.executable, "-c", textwrap.dedent(SERVER), mode, str(drain_s)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


@contextlib.contextmanager
def open_stream(address):
    body = {"prompt": "a", "stream": True}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=300) as response:
        lines = (line for line in response.iter_lines() if line)
        assert '"text":"a"' in next(lines)
        yield lines


def wait_unready(address):
    while httpx2.get(f"{address}/health/ready", timeout=300).status_code == 200:
        pass


def test_drain_finishes_streams_and_exits_0():
    with server_process("finish", 600) as (process, address), open_stream(address) as lines:
        process.send_signal(signal.SIGTERM)
        last, done = lines
        assert '"finish_reason":"stop"' in last
        assert done == "data: [DONE]"
        assert process.wait(300) == 0
        assert process.stderr.read() == ""


def test_drain_refuses_new_work_and_ends_late_streams_with_an_error():
    with server_process("told", 0.1) as (process, address), open_stream(address) as lines:
        process.send_signal(signal.SIGTERM)
        wait_unready(address)
        response = httpx2.post(f"{address}/v1/completions", json={"prompt": "b"}, timeout=300)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"
        process.stdin.write("\n")
        process.stdin.flush()
        error, done = lines
        assert '"error"' in error
        assert done == "data: [DONE]"
        assert process.wait(300) == 0


def test_second_signal_leaves_at_once():
    with server_process("hold", 600) as (process, address), open_stream(address) as lines:
        process.send_signal(signal.SIGTERM)
        wait_unready(address)
        process.send_signal(signal.SIGINT)
        error, done = lines
        assert '"error"' in error
        assert done == "data: [DONE]"
        assert process.wait(300) == 1
        printed = process.stderr.read()
        assert "EngineStopped: stopped by a second signal" in printed
        assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("drain_s", "signals", "status", "last"),
    [
        (600, 2, 1, "infmoe: error: stopped by a second signal before all requests had ended\n"),
        (0.1, 1, 0, ""),
    ],
)
def test_an_engine_that_computes_to_the_end_does_not_abort_the_process(
    drain_s, signals, status, last
):
    with server_process("busy", drain_s) as (process, address):
        assert httpx2.get(f"{address}/health/ready", timeout=300).status_code == 200
        process.send_signal(signal.SIGTERM)
        if signals == 2:
            wait_unready(address)
            process.send_signal(signal.SIGTERM)
        assert process.wait(300) == status
        assert process.stderr.read() == last


def test_failed_engine_ends_the_process():
    with server_process("fail", 600) as (process, address):
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(f"{address}/v1/completions", json={"prompt": "b"}, timeout=300)
        assert process.wait(300) == 1
        assert "EngineStopped: the engine has ended: out of memory" in process.stderr.read()


def test_the_routing_of_a_server_is_written_when_it_ends(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    trace = tmp_path / "trace.npz"
    settings = read_settings(model=tmp_path / "model", record_routing=trace, max_rows=2)
    engine = open_engine(tmp_path / "model", settings)
    wait_for(lambda: engine.state == "ready")

    async def scenario():
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        requests = [
            build_request(text, engine.tokenizer, engine.config, params, text) for text in "abcd"
        ]
        streams = [engine.submit(request) for request in requests]
        return [[event async for event in stream][-1] for stream in streams]

    ends = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert all(isinstance(end, Finished) for end in ends)
    assert not trace.exists()
    assert engine.drain(60)
    assert len(load_trace(trace).steps) > 0


def test_settings_reach_the_engine(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    before = torch.get_num_threads()
    given = {"model_name": "org/other", "invariant": True, "encoder_cache": "1KiB", "stall_s": 60}
    settings = read_settings(**given, max_queue_tokens=50, threads=before + 1)
    engine = open_engine(tmp_path / "model", settings)
    wait_for(lambda: engine.state == "ready")
    try:
        assert engine.model_name == "org/other"
        assert engine._loaded.model.is_invariant
        assert engine._queue_limits.max_tokens == 50
        assert engine._limits.encoder_cache_bytes == 1024
        assert engine._stall_s == 60
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
        assert engine.drain(60)


def test_the_plan_of_a_server_counts_its_adapters(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    settings = {"model": tmp_path / "model", "adapter_memory": "3MiB"}
    planned = {}
    for name, given in (("with", {"adapters": tmp_path / "adapters"}), ("without", {})):
        engine = open_engine(tmp_path / "model", read_settings(**settings, **given))
        wait_for(lambda engine=engine: engine.state == "ready")
        planned[name] = engine.plan.parts()
        assert engine.drain(60)
    assert planned["with"]["adapters"] == 3 * 2**20
    assert "adapters" not in planned["without"] or planned["without"]["adapters"] == 0


def test_the_longest_text_can_be_set(tmp_path):
    save_model(tiny_model(LLAMA), tmp_path / "model")
    planned = {}
    for length in (None, 40):
        settings = read_settings(max_model_len=length)
        engine = open_engine(tmp_path / "model", settings)
        wait_for(lambda engine=engine: engine.state == "ready")
        planned[length] = sum(engine.plan.parts()[part] for part in (CACHES, WORKSPACE))
        config, fingerprint = engine.config, model_fingerprint(engine._loaded.model)
        assert fingerprint == model_fingerprint(tiny_model(LLAMA))  # its adapters still fit
        assert engine.drain(60)
    assert config.max_prompt_tokens == 40
    with pytest.raises(PromptTooLong, match="the limit is 40 together"):
        build_request("a" * 36, engine.tokenizer, config, SamplingParams(max_tokens=5), "r")
    assert planned[40] < planned[None] / 3

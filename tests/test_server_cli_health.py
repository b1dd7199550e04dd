"""`infmoe health`: what it makes of every state of a server, and how soon."""

import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from engine.progress import LoadProgress
from server.__main__ import main
from server.cli_health import Unhealthy, ask, check_health, own_address
from server.lifecycle import open_socket
from server.metrics_disk import DiskCollector
from tests.deploy_tools import ROOT
from tests.fakes import FakeEngine, live_server
from tests.test_server_health import in_state, loading_engine


def test_a_server_that_is_ready_is_well():
    with live_server(FakeEngine()) as address:
        assert check_health(address) == "ready"


def test_the_command_tells_and_exits(capsys, monkeypatch):
    with live_server(FakeEngine()) as address:
        with pytest.raises(SystemExit) as caught:
            main(["health", address])
        assert not caught.value.code
        assert capsys.readouterr().out == "ready\n"
        monkeypatch.setenv("INFMOE_HOST", "0.0.0.0")
        monkeypatch.setenv("INFMOE_PORT", address.rpartition(":")[2])
        with pytest.raises(SystemExit) as caught:
            main(["health"])
        assert not caught.value.code
    with pytest.raises(SystemExit) as caught:
        main(["health", address])
    assert caught.value.code == 1
    assert "does not answer" in capsys.readouterr().err


def test_a_server_that_wants_keys_is_asked_without_one():
    with live_server(FakeEngine(), api_key="0123456789abcdef") as address:
        assert check_health(address) == "ready"


def test_loading_is_well_as_long_as_bytes_come():
    now_s = 0.0
    engine = loading_engine()
    engine.progress = LoadProgress(lambda: now_s)
    with live_server(engine) as address:
        now_s = 299.0  # before reading begins the same patience holds
        assert check_health(address) == "loading: reading expert 3 of 8, 0 of 0 bytes"
        engine.progress.begin(1000)
        engine.progress.add(250)
        now_s += 299.0
        assert check_health(address) == "loading: reading expert 3 of 8, 250 of 1000 bytes"
        now_s += 2.0
        with pytest.raises(Unhealthy, match="stuck for 301 s: reading expert 3 of 8, 250 of 1000"):
            check_health(address)
        assert check_health(address, patience_s=400.0).startswith("loading: ")


@pytest.mark.parametrize("state", ["draining", "failed", "stopped"])
def test_what_will_not_be_ready_is_not_well(state):
    with (
        live_server(in_state(state)) as address,
        pytest.raises(Unhealthy, match=f"the server is {state}"),
    ):
        check_health(address)


def test_another_server_is_not_well():
    with live_server(FakeEngine()) as address:
        with pytest.raises(Unhealthy, match="no InfMoE server"):
            check_health(f"{address}/nowhere")
        with pytest.raises(Unhealthy, match="does not answer"):
            ask(address, "/metrics")  # no JSON


class Lister(BaseHTTPRequestHandler):
    """Answers everything with a list."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments):
        pass


def test_a_list_is_no_answer():
    with HTTPServer(("127.0.0.1", 0), Lister) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(Unhealthy, match="no InfMoE server"):
            check_health(f"http://127.0.0.1:{other.server_port}")
        thread.join()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:99999", "http://["]
)
def test_what_is_no_address(url):
    with pytest.raises(Unhealthy, match="is no address of a server"):
        check_health(url)


def test_nobody_listens():
    with open_socket("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(Unhealthy, match="does not answer: .*refused"):
        check_health(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"INFMOE_PORT": "9", "INFMOE_HOST": "0.0.0.0"}, "http://127.0.0.1:9"),
        ({"INFMOE_HOST": "::"}, "http://[::1]:8000"),
        ({"INFMOE_HOST": "10.0.0.5"}, "http://10.0.0.5:8000"),
    ],
)
def test_its_own_server_is_where_the_settings_say(variables, address):
    assert own_address(variables) == address


def test_it_is_quick_and_loads_nothing_heavy():
    code = """if True:
        import sys
        from server.__main__ import main
        try:
            main(["health", sys.argv[1]])
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "fastapi", "numpy", "uvicorn", "prometheus_client"}
        print(sorted(heavy & set(sys.modules)))
    """
    with live_server(FakeEngine()) as address:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, address]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.splitlines() == ["ready", "[]"]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5  # 0.1 s


def test_room_on_the_disk_of_adapters_is_told_while_there_is_a_folder(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    collector = DiskCollector(folder)
    free, size = collector.collect()
    assert 0 < free.samples[0].value <= size.samples[0].value
    folder.rmdir()
    assert list(collector.collect()) == []

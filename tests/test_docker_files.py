"""Dockerfile, compose file, proxy and the script that tests the image, by their own tools."""

import json
import os
import re
import shutil
import subprocess

import httpx2
import pytest
import yaml

from engine.request import Piece
from server.lifecycle import CLOSE_S
from server.settings import Settings, is_loopback
from server.settings_sources import read_settings
from tests.deploy_tools import DOCKER, ROOT, find_compose, find_tool, require_well, run_tool
from tests.fakes import HOLD, FakeEngine, finished, live_server
from tests.ports import free_port

DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = ROOT / "docker-compose.yml"
KEYED = DOCKER / "compose.keys.yml"
SERVERS = ("infmoe", "infmoe-gpu")
PROFILES = {
    "gpu": {"infmoe-gpu"},
    "monitoring": {"prometheus", "grafana"},
    "proxy": {"proxy"},
}


def stages():
    """The instructions of each stage of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found = {}
    for line in filter(None, text.splitlines()):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            base, name = match.groups()
            found[name] = list(found.get(base, []))
        elif found:
            found[name].append(line)
    return found


def image_variables(stage):
    text = " ".join(line[4:] for line in stages()[stage] if line.startswith("ENV "))
    return dict(pair.split("=", 1) for pair in text.split())


def settings_of(monkeypatch, variables):
    """What a server makes of the variables of a container."""
    for name in [name for name in os.environ if name.startswith("INFMOE_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        if name.startswith("INFMOE_"):
            monkeypatch.setenv(name, value)
    return read_settings()


def compose(*files, profiles=PROFILES, **variables):
    """The services as Compose understands them."""
    program = find_compose()
    arguments = [part for file in files for part in ("-f", file)]
    arguments += [part for profile in profiles for part in ("--profile", profile)]
    result = run_tool(
        program, "--env-file", os.devnull, *arguments, "config", "--format", "json", **variables
    )
    return json.loads(require_well(result))["services"]


def test_hadolint_finds_nothing():
    assert require_well(run_tool(find_tool("hadolint"), DOCKER / "Dockerfile")) == ""


def test_the_default_stage_is_the_one_without_a_gpu():
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_runs_is_a_numeric_user_and_an_exec_form(target):
    lines = stages()[target]
    assert lines[-1] == "USER 1000:1000"
    assert 'ENTRYPOINT ["infmoe"]' in lines
    assert 'CMD ["serve"]' in lines
    assert "STOPSIGNAL SIGTERM" in lines
    (check,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    assert check.endswith('CMD ["infmoe", "health"]')
    assert not [line for line in lines if re.search(r"\b(pip|apt-get) ", line)]


@pytest.mark.parametrize("target", ["builder-cpu", "builder-cuda"])
def test_the_source_comes_after_what_it_depends_on(target):
    lines = stages()[target]
    order = [
        next(number for number, line in enumerate(lines) if text in line)
        for text in ("^torch==", "-c constraints.txt", "COPY server", "--no-deps .")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_without_keys_refuses_to_serve_everybody(target, monkeypatch):
    settings = settings_of(monkeypatch, image_variables(target))
    assert str(settings.model) == "/models/demo"
    with pytest.raises(Exception, match="no key is set"):
        settings.require_safe()


def test_files_name_no_foreign_host_for_packages():
    for path in (DOCKER / "Dockerfile", DOCKER / "test-image.sh", COMPOSE):
        assert "https://" not in path.read_text(), path


def test_only_what_is_copied_goes_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = set()
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


def test_without_a_profile_compose_serves_the_demo(monkeypatch):
    services = compose(COMPOSE, profiles=())
    assert set(services) == {"infmoe"}
    service = services["infmoe"]
    settings = settings_of(monkeypatch, image_variables("cpu") | service["environment"])
    settings.require_safe()
    assert str(settings.model) == "/models/demo"
    (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/models"]
    assert mount["read_only"] is True
    assert mount["source"] == str(ROOT / "models")
    assert (ROOT / "models/demo/config.json").exists()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_adds_its_services(profile):
    assert set(compose(COMPOSE, profiles=[profile])) == {"infmoe"} | PROFILES[profile]


def test_compose_finds_mistakes(tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text("services: {a: {image: b, mem_limitt: 1g}}\n")
    result = run_tool(find_compose(), "-f", broken, "config", "-q")
    assert result.returncode != 0
    assert "mem_limitt" in result.stderr


def test_no_service_has_more_rights_than_it_needs():
    for name, service in compose(COMPOSE).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) > 0, name
        assert all(is_loopback(port["host_ip"]) for port in service["ports"]), name
        assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else [])


@pytest.mark.parametrize("name", SERVERS)
def test_servers_write_to_their_volumes_only_and_may_finish(name, monkeypatch):
    service = compose(COMPOSE)[name]
    assert service["user"] == "1000:1000"
    mounts = {volume["target"]: volume.get("read_only", False) for volume in service["volumes"]}
    assert mounts == {"/models": True, "/adapters": False, "/state": False}
    settings = settings_of(monkeypatch, service["environment"])
    assert service["stop_grace_period"] == "1m0s"
    assert max(settings.drain_s, settings.drain_delay_s) + CLOSE_S < 60
    assert service["stop_signal"] == "SIGTERM"


def test_the_gpu_is_reserved_and_its_pinned_memory_is_counted(monkeypatch):
    service = compose(COMPOSE, GPU_HOST_MEMORY_LIMIT="32g")["infmoe-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert service["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert service["build"]["target"] == "cuda"
    assert int(service["mem_limit"]) == 32 * 2**30
    settings = settings_of(monkeypatch, image_variables("cuda") | service["environment"])
    assert settings.gpu_memory == 8 * 2**30
    assert settings.memory is None  # planned within the limit, pinned bytes included


def test_with_keys_nobody_comes_in_without_one(monkeypatch, tmp_path):
    for name in ("keys.jsonl", "metrics.key"):
        (tmp_path / name).touch()
    files = {
        "KEYS_FILE": str(tmp_path / "keys.jsonl"),
        "METRICS_KEY_FILE": str(tmp_path / "metrics.key"),
    }
    services = compose(COMPOSE, KEYED, **files)
    for name in SERVERS:
        settings = settings_of(monkeypatch, services[name]["environment"])
        assert settings.has_keys
        assert not settings.allow_unauthenticated
        (secret,) = services[name]["secrets"]
        assert str(settings.keys_file) == f"/run/secrets/{secret['source']}"
    refused = run_tool(find_compose(), "-f", COMPOSE, "-f", KEYED, "config", "-q")
    assert refused.returncode != 0
    assert re.search(r"KEYS?_FILE is missing a value", refused.stderr)


def test_caddy_accepts_its_file():
    caddy = find_tool("caddy")
    file = DOCKER / "proxy" / "Caddyfile"
    require_well(run_tool(caddy, "validate", "--config", file, "--adapter", "caddyfile"))
    assert require_well(run_tool(caddy, "fmt", file)).strip() == file.read_text().strip()


def test_streams_pass_the_proxy_as_they_come_and_metrics_stay_inside(tmp_path):
    caddy = find_tool("caddy")
    site = f"http://127.0.0.1:{free_port()}"
    engine = FakeEngine(
        lambda request: [Piece("a", (1,)), HOLD, Piece("b", (2,)), finished(request)]
    )
    folders = {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    with live_server(engine, max_upload_bytes=1000) as address:
        variables = {"SITE": site, "UPSTREAM": address.removeprefix("http://"), **folders}
        proxy = subprocess.Popen(
            [caddy, "run", "--config", DOCKER / "proxy/Caddyfile", "--adapter", "caddyfile"],
            env=os.environ | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            for line in proxy.stderr:
                if "serving initial configuration" in line:
                    break
            body = {"prompt": "ab", "stream": True}
            with httpx2.stream("POST", f"{site}/v1/completions", json=body, timeout=300) as reply:
                lines = reply.iter_lines()
                assert '"a"' in next(lines)  # while the engine still waits
                assert engine.held.wait(300)
                engine.release()
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert httpx2.get(f"{site}/health/ready", timeout=300).status_code == 200
            for path in ("/metrics", "/admin/adapters"):
                assert httpx2.get(f"{site}{path}", timeout=300).status_code == 404
        finally:
            proxy.terminate()
            proxy.communicate(timeout=300)
    assert proxy.returncode == 0


def test_the_proxy_waits_as_long_as_the_server():
    text = (DOCKER / "proxy" / "Caddyfile").read_text()
    seconds = {name: int(s) for name, s in re.findall(r"^\s*(\w+) (\d+)s$", text, re.MULTILINE)}
    defaults = Settings()
    assert seconds["response_header_timeout"] > defaults.request_timeout_s
    assert seconds["read_body"] > defaults.body_timeout_s
    size = re.search(r"max_size (\d+)MiB", text)
    assert int(size[1]) * 2**20 >= max(defaults.max_upload_bytes, defaults.max_body_bytes)


def test_the_test_of_the_image_is_skipped_with_a_reason_where_a_tool_is_missing(tmp_path):
    script = DOCKER / "test-image.sh"
    bash = find_tool("bash")
    require_well(run_tool(bash, "-n", script))
    for name in ("dirname", "sed", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = run_tool(bash, script, PATH=str(tmp_path))
    assert result.returncode == 77
    assert result.stderr.startswith("skipped: ")


def test_every_variable_of_compose_is_explained():
    text = (ROOT / "docs/operations.md").read_text()
    for path in (COMPOSE, KEYED):
        for name in re.findall(r"\$\{(\w+)", path.read_text()):
            assert f"`{name}`" in text, name


def test_yaml_has_no_duplicates():
    """PyYAML takes the last of two keys; Compose and kubectl do not all say so."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if key.value != "<<"]
            assert len(names) == len(set(names)), names
            return super().construct_mapping(node, deep)

    for path in [COMPOSE, *DOCKER.rglob("*.yml"), *DOCKER.rglob("*.yaml")]:
        assert list(yaml.load_all(path.read_text(), Loader=Strict)), path

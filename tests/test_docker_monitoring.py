"""Alerts and dashboard: what they ask for is exported, and a real Prometheus can answer it."""

import contextlib
import json
import os
import re
import subprocess
import time
from datetime import UTC, datetime

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import create_app
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from server.settings import Settings
from tests.deploy_tools import DOCKER, ROOT, find_tool, require_well, run_tool
from tests.fakes import live_server
from tests.ports import free_port
from tests.test_server_info import planned_engine

FOLDER = DOCKER / "monitoring"
GRAFANA = FOLDER / "grafana"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
BOARD = json.loads((GRAFANA / "dashboards/infmoe.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ROWS = ["Traffic", "Latency", "Expert cache", "Tiers", "Adapters", "Loading and state"]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
KEY = "metrics-key-of-a-test"


def board_queries():
    """What the panels ask, as Prometheus gets it."""
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries += [note["expr"] for note in BOARD["annotations"]["list"]]
    return [q.replace("$__rate_interval", "1m").replace("$instance", ".*") for q in queries]


def exported_names(tmp_path):
    """Every name that a server with a plan, offloaded experts and adapters may tell a sample of."""
    engine = planned_engine()
    engine.process_id = os.getpid()  # as if it had one of its own
    client = TestClient(create_app(engine, Settings(adapters=tmp_path)))
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {family.name + end for family in families for end in SUFFIXES[family.type]}


def unknown_names(queries, names):
    texts = [re.sub(r'"[^"]*"', "", query) for query in queries]
    return {name for text in texts for name in re.findall(r"\binfmoe_\w+", text)} - names


def test_alerts_and_dashboard_ask_for_what_is_exported(tmp_path):
    names = exported_names(tmp_path)
    assert "infmoe_expert_hits_total" in names
    assert "infmoe_rate_limited_total" in names  # without a sample yet
    assert unknown_names([rule["expr"] for rule in RULES], names) == set()
    assert unknown_names(board_queries(), names) == set()
    queried = BOARD["templating"]["list"][0]["query"]["query"]
    assert unknown_names([queried], names) == set()
    assert unknown_names(["rate(infmoe_expert_hit_total[1m])"], names) != set()


def test_the_dashboard_shows_all_that_is_exported(tmp_path):
    shown = " ".join(board_queries())
    for name in exported_names(tmp_path):
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        if not family.startswith(("infmoe_process_", "infmoe_expert_", "infmoe_adapter_")):
            continue
        if family.startswith("infmoe_process_"):  # six of the client library; three are shown
            continue
        assert family in shown, name


def test_alerts_are_accepted_and_fire_when_they_should():
    promtool = find_tool("promtool")
    assert f"{len(RULES)} rules found" in require_well(
        run_tool(promtool, "check", "rules", FOLDER / "alerts.yml")
    )
    require_well(run_tool(promtool, "test", "rules", FOLDER / "alerts-test.yml"))
    cases = yaml.safe_load((FOLDER / "alerts-test.yml").read_text())["tests"]
    fired = {c["alertname"] for t in cases for c in t["alert_rule_test"] if c.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in RULES}


def test_the_settings_of_prometheus_are_accepted():
    promtool = find_tool("promtool")
    path = FOLDER / "prometheus.yml"
    require_well(run_tool(promtool, "check", "config", "--syntax-only", path))


def test_queries_of_the_dashboard_are_accepted(tmp_path):
    rules = [{"record": f"query:{n}", "expr": q} for n, q in enumerate(board_queries())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    require_well(run_tool(find_tool("promtool"), "check", "rules", path))


def test_every_alert_is_explained():
    text = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| `(Infmoe\w+)`", text, re.MULTILINE)) == {
        rule["alert"] for rule in RULES
    }
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in RULES)


def test_the_dashboard_is_whole():
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == ROWS
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    (source,) = yaml.safe_load((GRAFANA / "datasources/prometheus.yml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in PANELS}
    assert used == {source["uid"]}
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(letters) == len(set(letters))


def test_grafana_finds_the_dashboard_where_compose_puts_it():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(m.removesuffix(":ro").split(":") for m in services["grafana"]["volumes"])
    assert mounts["./docker/monitoring/grafana/dashboards"] == "/etc/dashboards"
    (provider,) = yaml.safe_load((GRAFANA / "dashboards.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/dashboards"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == "/etc/dashboards/infmoe.json"


@contextlib.contextmanager
def prometheus(folder, address):
    """The real one with our settings and rules, watching a server; yields a client of its API."""
    program = find_tool("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]  # there are no containers here
    job["static_configs"] = [{"targets": [address.removeprefix("http://")]}]
    job["authorization"]["credentials_file"] = str(folder / "key")
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(FOLDER / "alerts.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "key").write_text(KEY)
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=300) as client:
            yield client
    finally:
        process.terminate()
        process.wait(300)


def wait_for(look, seconds=300):
    """What `look` finds, as soon as it finds something."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        with contextlib.suppress(httpx2.TransportError, ValueError):  # it is not up yet
            if found := look():
                return found
        time.sleep(0.1)
    raise AssertionError("nothing came")


def ask(client, path, **fields):
    answer = client.get(path, params=fields).json()
    assert answer["status"] == "success", (fields, answer)
    return answer["data"]


def test_a_real_prometheus_scrapes_a_server_and_evaluates_every_alert(tmp_path):
    find_tool("prometheus")
    keys, adapters = tmp_path / "keys.jsonl", tmp_path / "adapters"
    adapters.mkdir()
    record = KeyRecord(
        name="prometheus", sha256=hash_key(KEY), scopes=("metrics",), created=datetime.now(UTC)
    )
    write_keys(keys, [record])
    engine = planned_engine()
    with (
        live_server(engine, keys_file=keys, adapters=adapters) as address,
        prometheus(tmp_path, address) as client,
    ):
        is_up = 'up{job="infmoe"} == 1'
        wait_for(lambda: client.get("/query", params={"query": is_up}).json()["data"]["result"])
        refused = httpx2.get(f"{address}/metrics", timeout=300)
        assert refused.status_code == 401  # the key was needed

        def evaluated():
            (group,) = ask(client, "/rules")["groups"]
            rules = group["rules"]
            return rules if all(rule["health"] != "unknown" for rule in rules) else None

        rules = wait_for(evaluated)
        assert [(rule["name"], rule["health"]) for rule in rules] == [
            (rule["alert"], "ok") for rule in RULES
        ]
        for query in [*(rule["expr"] for rule in RULES), *board_queries()]:
            ask(client, "/query", query=query)
        (sample,) = ask(client, "/query", query="infmoe_expert_hits_total")["result"]
        assert sample["value"][1] == "3"
        engine.state = "failed"  # an alert without a time to wait fires at once

        def firing():
            alerts = ask(client, "/alerts")["alerts"]
            return [a for a in alerts if a["labels"]["alertname"] == "InfmoeEngineFailed"]

        (alert,) = wait_for(firing)
        assert alert["state"] == "firing"


@pytest.mark.parametrize("severity", ["critical", "warning", "info"])
def test_there_are_alerts_of_each_severity(severity):
    assert [rule for rule in RULES if rule["labels"]["severity"] == severity]

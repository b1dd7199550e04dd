"""The manifests for Kubernetes: rendered, checked against its schemas, and against our settings."""

import pytest
import yaml

from server.lifecycle import CLOSE_S
from tests.deploy_tools import DOCKER, find_tool, require_well, run_tool
from tests.test_docker_files import image_variables, settings_of
from tests.test_docker_monitoring import exported_names

FOLDER = DOCKER / "k8s"


def read_documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def render():
    kubectl = find_tool("kubectl")
    return read_documents(require_well(run_tool(kubectl, "kustomize", FOLDER)))


def source(kind):
    """The one document of a kind, as it is written; needs no tool."""
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    documents = [d for name in names for d in read_documents((FOLDER / name).read_text())]
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod():
    return source("Deployment")["spec"]["template"]["spec"]


def container():
    (found,) = pod()["containers"]
    return found


def variables():
    """What the container gets from its image and from the map of settings."""
    (made,) = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    return image_variables("cpu") | dict(text.split("=", 1) for text in made["literals"])


def test_schemas_accept_what_is_rendered():
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is not installed; the extra deploy has it",
    )
    documents = render()
    assert {document["kind"] for document in documents} == {
        *("ConfigMap", "Deployment", "Service", "PersistentVolumeClaim"),
        *("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"),
    }
    version = kubernetes_validate.latest_version()
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[-1]["spec"]["podSelektor"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[-1], version, strict=True)


def test_what_is_rendered_fits_together():
    by_kind = {document["kind"]: document for document in render()}
    deployment = by_kind["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "infmoe"}
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert deployment["selector"]["matchLabels"] == labels
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (rendered,) = deployment["template"]["spec"]["containers"]
    assert rendered["image"] == "infmoe:cpu"
    (origin,) = rendered["envFrom"]
    assert origin["configMapRef"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]


def test_the_server_takes_its_settings(monkeypatch):
    settings = settings_of(monkeypatch, variables())
    settings.require_safe()
    assert settings.has_keys
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(settings.keys_file.parent) in mounts
    assert str(settings.adapters) in mounts
    # A service called infmoe would set INFMOE_PORT=tcp://..., which is no port.
    assert pod()["enableServiceLinks"] is False


def test_a_pod_may_finish_before_it_is_killed(monkeypatch):
    settings = settings_of(monkeypatch, variables())
    wait_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = max(settings.drain_s, settings.drain_delay_s)
    assert wait_s + drain_s + CLOSE_S < pod()["terminationGracePeriodSeconds"]


def test_the_three_probes_ask_their_own_paths():
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {
        "startup": "/health/startup",
        "liveness": "/health/live",
        "readiness": "/health/ready",
    }
    startup = probes["startup"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600


def test_nothing_is_written_but_volumes_and_no_right_is_left():
    security = container()["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod()["securityContext"]["runAsUser"] == 1000
    assert pod()["automountServiceAccountToken"] is False
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container()["volumeMounts"]}
    writable = {path for path, is_read_only in mounts.items() if not is_read_only}
    assert writable == {"/adapters", "/state", "/tmp"}
    assert {m["name"] for m in container()["volumeMounts"]} == {v["name"] for v in pod()["volumes"]}


def test_memory_is_asked_for_in_full():
    resources = container()["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_autoscaler_follows_a_metric_that_there_is(tmp_path):
    spec = source("HorizontalPodAutoscaler")["spec"]
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "infmoe_queue_depth"
    assert "infmoe_queue_depth" in exported_names(tmp_path)
    assert spec["scaleTargetRef"]["name"] == source("Deployment")["metadata"]["name"]
    assert "replicas" not in source("Deployment")["spec"]  # else each apply undoes the autoscaler


def test_claims_are_those_that_are_mounted():
    claims = {
        document["metadata"]["name"]
        for document in read_documents((FOLDER / "storage.yaml").read_text())
    }
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod()["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == used

"""The chart renders with every option; what it renders is valid for Kubernetes and may no more than it must."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kubernetes_binaries
from kubernetes_schemas import problems

pytestmark = pytest.mark.timeout(900)  # the first time it builds Helm
_TREE = Path(__file__).parents[3]
CHART = _TREE / "charts/remora"
EXAMPLES = sorted((_TREE / "examples/kubernetes").glob("*.yaml"))
EVERYTHING = (
    "gpu.enabled=true",
    "autoscaling.enabled=true",
    "autoscaling.replicas=2",
    "metrics.serviceMonitor.enabled=true",
    "nodeSelector.pool=remora",
    "tolerations[0].operator=Exists",
    "image.pullSecrets[0].name=registry",
    "agent.traceEndpoint=http://collector:4318",
    "agent.extraArgs[0]=--listen=unix:///run/remora/accel.sock",
    "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring",
    "devicePlugin.cpus=2",
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "gpu": ("gpu.enabled=true",),
    "everything": EVERYTHING,
    "no tls": ("tls.mode=none",),
    "own certificates": ("tls.mode=secret", "tls.caBundle=PEM", "autoscaling.enabled=true"),
    "nothing optional": (
        "installer.enabled=false",
        "devicePlugin.enabled=false",
        "networkPolicy.enabled=false",
        "runtimeClass.create=false",
        "tls.mode=none",
    ),
    "uninstall": ("installer.action=uninstall",),
    "models elsewhere": ("agent.modelsPath=/srv/models",),
}
#: What it takes to give a worker a user and a user namespace of its own, and to end it; nothing else.
CAPABILITIES = {"SETUID", "SETGID", "SETFCAP", "KILL"}


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return kubernetes_binaries.find("helm")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def template(binary: Path, *options: str) -> subprocess.CompletedProcess[str]:
    sets = [word for option in options for word in ("--set", option)]
    argv = [str(binary), "template", "remora", str(CHART), "--namespace=remora", "--kube-version=1.34.0", *sets]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def render(binary: Path, *options: str) -> list[dict[str, Any]]:
    done = template(binary, *options)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if document["kind"] in ("DaemonSet", "Deployment"):
            yield document["metadata"]["name"], document["spec"]["template"]
        elif document["kind"] == "Pod":
            yield document["metadata"]["name"], document


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_that_the_chart_renders_is_valid(binary: Path, options: tuple[str, ...]) -> None:
    documents = render(binary, *options)
    assert [problem for document in documents for problem in problems(document)] == []
    names = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_container_may_more_than_it_must(binary: Path, options: tuple[str, ...]) -> None:
    for name, pod in pods(render(binary, *options)):
        spec = pod["spec"]
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), name
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            rights = container["securityContext"]
            assert not rights.get("privileged")
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"]["drop"] == ["ALL"]
            added = set(rights["capabilities"].get("add", ()))
            assert added == (CAPABILITIES if container["name"] == "agent" else set())
            if container["name"] != "agent":
                assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["resources"]["limits"]["memory"]
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted <= {volume["name"] for volume in spec.get("volumes", ())}
        for volume in spec.get("volumes", ()):
            assert volume.get("hostPath", {}).get("path") not in ("/", "/etc", "/var", "/run", "/usr", "/dev", "/proc")


def test_selectors_find_what_they_are_for_and_nothing_else(binary: Path) -> None:
    documents = render(binary, *EVERYTHING)
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(documents)}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, found in labels.items() if selector.items() <= found.items()}

    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in ("DaemonSet", "Deployment"):
            assert selected(spec["selector"]["matchLabels"]) == {document["metadata"]["name"]}
        elif document["kind"] == "Service":
            wanted = {"remora-agent", "remora-agent-gpu"} if "metrics" in document["metadata"]["name"] else None
            assert selected(spec["selector"]) == (wanted or {document["metadata"]["name"]})


def test_gpu_nodes_and_others_get_one_agent_each(binary: Path) -> None:
    terms = {}
    for name, pod in pods(render(binary, "gpu.enabled=true")):
        if name.startswith("remora-agent"):
            node = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            terms[name] = node["nodeSelectorTerms"][0]["matchExpressions"][-1]["operator"]
    assert terms == {"remora-agent": "DoesNotExist", "remora-agent-gpu": "Exists"}


def test_a_drain_is_waited_for_before_the_pod_is_killed(binary: Path) -> None:
    spec = next(pod for name, pod in pods(render(binary)) if name == "remora-agent")["spec"]
    agent = next(container for container in spec["containers"] if container["name"] == "agent")
    command = agent["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["remora", "agent", "drain", "--timeout=60"]
    assert spec["terminationGracePeriodSeconds"] > 60


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("agent.polcy=x", "polcy"),
        ("tls.mode=maybe", "tls"),
        ("agent.drainSeconds=-1", "drainSeconds"),
        ("installer.binDir=usr/local/bin", "binDir"),
        ("autoscaling.enabled=true,tls.mode=none", "needs the agents' metrics over TLS"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(binary: Path, option: str, says: str) -> None:
    done = template(binary, option)
    assert done.returncode != 0
    assert says in done.stderr


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "values" not in path.name], ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert [problem for document in documents for problem in problems(document)] == []


def test_the_examples_values_fit_the_chart_and_its_policy_is_one(binary: Path) -> None:
    from remora.agent import policy

    values = next(path for path in EXAMPLES if "values" in path.name)
    argv = [str(binary), "template", "remora", str(CHART), "--kube-version=1.34.0", "-f", str(values)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    config = next(d for d in yaml.safe_load_all(done.stdout) if d and d["kind"] == "ConfigMap")
    policy.parse(config["data"]["agent.toml"], "agent.toml")


def test_the_schemas_refuse_what_kubernetes_would() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "x"}]}}
    assert problems(pod) == []
    assert problems({**pod, "spec": {"containers": [{"name": "x", "imagePulPolicy": "Never"}]}})
    assert problems({**pod, "spec": {"containers": [{"name": "x", "resources": {"limits": {"memory": "1 GB"}}}]}})
    assert problems({**pod, "spec": {}})
    assert problems({**pod, "kind": "Pot"})

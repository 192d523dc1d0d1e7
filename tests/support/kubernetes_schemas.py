"""Holds manifests to the schemas of Kubernetes itself, strictly: an unknown field is wrong, as for kubeconform.

`tests/data/kubernetes/schemas.json` holds what our kinds need of them, without descriptions. Written anew by
`python tests/support/kubernetes_schemas.py`, out of the Go modules that publish them: k8s.io/kubernetes (OpenAPI),
kube-aggregator's APIService with it, knative.dev/serving and prometheus-operator (CRDs).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

FILE = Path(__file__).parent.parent / "data" / "kubernetes" / "schemas.json"
MODULES = {
    "k8s.io/kubernetes": "v1.34.4",
    "knative.dev/serving": "v0.51.0",
    "github.com/prometheus-operator/prometheus-operator": "v0.85.0",
}
_CRDS = {
    "knative.dev/serving": "config/core/300-resources/service.yaml",
    "github.com/prometheus-operator/prometheus-operator": (
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"
    ),
}
#: Kinds that chart and examples use.
KINDS = frozenset(
    {
        "apiregistration.k8s.io/v1/APIService",
        "apps/v1/DaemonSet",
        "apps/v1/Deployment",
        "autoscaling/v2/HorizontalPodAutoscaler",
        "networking.k8s.io/v1/NetworkPolicy",
        "node.k8s.io/v1/RuntimeClass",
        "policy/v1/PodDisruptionBudget",
        "rbac.authorization.k8s.io/v1/ClusterRole",
        "rbac.authorization.k8s.io/v1/ClusterRoleBinding",
        "rbac.authorization.k8s.io/v1/Role",
        "rbac.authorization.k8s.io/v1/RoleBinding",
        "v1/ConfigMap",
        "v1/Namespace",
        "v1/Pod",
        "v1/Secret",
        "v1/Service",
        "v1/ServiceAccount",
    }
)
_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
#: apimachinery's resource.Quantity: its own grammar.
_QUANTITY = {
    "anyOf": [
        {"type": "string", "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"},
        {"type": "number"},
    ]
}
_SPECIAL = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": _QUANTITY,
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["integer", "string"]},
}
_LEFT_OUT = ("description", "default", "format", "example", "externalDocs")


def problems(document: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a manifest: path and reason; empty if it is valid."""
    kind = f"{document.get('apiVersion')}/{document.get('kind')}"
    validator = _validator(kind)
    if validator is None:
        return [f"{kind}: there is no schema of it"]
    found = validator.iter_errors(document)
    return [f"{kind} {'/'.join(map(str, error.instance_path))}: {error.message}" for error in found]


@cache
def _validator(kind: str) -> jsonschema_rs.Draft202012Validator | None:
    data = _data()
    name = data["kinds"].get(kind)
    if name is None:
        return None
    return jsonschema_rs.Draft202012Validator({"$ref": f"#/definitions/{name}", "definitions": data["definitions"]})


@cache
def _data() -> Any:
    return json.loads(FILE.read_text())


def extract() -> dict[str, Any]:
    """Read the modules, which the Go proxy serves."""
    swagger = json.loads((_module("k8s.io/kubernetes") / "api/openapi-spec/swagger.json").read_text())["definitions"]
    kinds: dict[str, str] = {}
    for name, schema in swagger.items():
        for one in schema.get("x-kubernetes-group-version-kind", ()):
            kind = "/".join(filter(None, (one["group"], one["version"], one["kind"])))
            if kind in KINDS:
                kinds[kind] = name
    definitions: dict[str, Any] = {}
    waiting = [*kinds.values(), _META]
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            definitions[name] = _SPECIAL.get(name) or strict(swagger[name])
            waiting += _references(definitions[name])
    for module, path in _CRDS.items():
        crd = yaml.safe_load((_module(module) / path).read_text())["spec"]
        for version in crd["versions"]:
            if version["storage"]:
                kind = f"{crd['group']}/{version['name']}/{crd['names']['kind']}"
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"$ref": f"#/definitions/{_META}"}
                kinds[kind] = definitions_name = f"crd.{kind.replace('/', '.')}"
                definitions[definitions_name] = schema
    missing = KINDS - kinds.keys()
    assert not missing, missing
    return {"modules": MODULES, "kinds": kinds, "definitions": definitions}


def strict(schema: Any) -> Any:
    """Return an OpenAPI schema as a JSON schema that takes no unknown field."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: strict(one) for name, one in value.items()}
        elif key not in _LEFT_OUT and not key.startswith("x-kubernetes-"):
            result[key] = value if key in ("enum", "required") else strict(value)
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _module(name: str) -> Path:
    done = subprocess.run(
        ["go", "mod", "download", "-json", f"{name}@{MODULES[name]}"], capture_output=True, check=True, timeout=600
    )
    return Path(json.loads(done.stdout)["Dir"])


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(extract(), separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes", file=sys.stderr)

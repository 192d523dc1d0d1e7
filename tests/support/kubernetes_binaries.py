"""The programs of a Kubernetes cluster: those on PATH, or built once from their Go modules into a cache by version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MODULE = Path(__file__).parent.parent / "kubernetes" / "binaries"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    **{
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
    },
}
#: The first build compiles some 3,000 packages.
BUILD_S = 5400.0


def version() -> str:
    """Return the release of Kubernetes that the module names."""
    match = re.search(r"k8s\.io/kubernetes v(\S+)", (MODULE / "go.mod").read_text())
    assert match is not None
    return match[1]


def cache() -> Path:
    """Return where the built programs are kept: outside the tree, by version."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "remora" / "kubernetes" / version()


def find() -> dict[str, Path]:
    """Return the programs that are there: all from PATH, or all from the cache; empty if neither has all."""
    on_path = {name: shutil.which(name) for name in PACKAGES}
    if all(on_path.values()):
        return {name: Path(path) for name, path in on_path.items() if path}
    cached = {name: cache() / name for name in PACKAGES}
    return cached if all(path.is_file() for path in cached.values()) else {}


def build() -> dict[str, Path]:
    """Build what is not there yet; says what it does, because it takes long."""
    if found := find():
        return found
    go = shutil.which("go")
    if go is None:
        raise FileNotFoundError("go is not installed, and no Kubernetes programs are on PATH")
    place = cache()
    place.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if (place / name).is_file():
            continue
        print(f"building {name} {version()} ...", file=sys.stderr, flush=True)
        draft = place / f".{name}"
        flags = ["-trimpath", "-ldflags", f"-s -w -X k8s.io/component-base/version.gitVersion=v{version()}"]
        environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
        subprocess.run(
            [go, "build", *flags, "-o", str(draft), package], cwd=MODULE, env=environment, check=True, timeout=BUILD_S
        )
        draft.rename(place / name)
    return find()


if __name__ == "__main__":
    for program, path in build().items():
        print(f"{program}: {path}")

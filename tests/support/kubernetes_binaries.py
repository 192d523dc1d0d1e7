"""The programs of a Kubernetes cluster: those on PATH, or built once from their Go modules into a cache by version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_KUBERNETES = Path(__file__).parent.parent / "kubernetes"
#: For each program its module of ours, the module that tells its version, and its package.
PROGRAMS = {
    "etcd": ("binaries", "k8s.io/kubernetes", "go.etcd.io/etcd/server/v3"),
    **{
        name: ("binaries", "k8s.io/kubernetes", f"k8s.io/kubernetes/cmd/{name}")
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
    },
    "helm": ("helm", "helm.sh/helm/v3", "helm.sh/helm/v3/cmd/helm"),
    "coredns": ("coredns", "github.com/coredns/coredns", "."),
}
#: The first build compiles some 3,000 packages.
BUILD_S = 5400.0


def version(program: str) -> str:
    """Return the release that the program's module names: `1.34.4`."""
    folder, module, _ = PROGRAMS[program]
    match = re.search(rf"{module} v(\S+)", (_KUBERNETES / folder / "go.mod").read_text())
    assert match is not None
    return match[1]


def cached(program: str) -> Path:
    """Return where the built program is kept: outside the tree, by version."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remora"
    folder = {"binaries": "kubernetes"}.get(PROGRAMS[program][0], program)
    return base / folder / version(program) / program


def build() -> dict[str, Path]:
    """Return the programs: all from PATH, or else from the cache, where what is missing is built, which takes long."""
    on_path = {name: shutil.which(name) for name in PROGRAMS}
    if all(on_path.values()):
        return {name: Path(path) for name, path in on_path.items() if path}
    for name in PROGRAMS:
        if not cached(name).is_file():
            _build(name)
    return {name: cached(name) for name in PROGRAMS}


def find(program: str) -> Path:
    """Return one program: from PATH, or else from the cache, built first if it must be.

    Raises:
        FileNotFoundError: it is nowhere, and there is no Go to build it with.
    """
    if on_path := shutil.which(program):
        return Path(on_path)
    if not cached(program).is_file():
        _build(program)
    return cached(program)


def _build(name: str) -> None:
    go = shutil.which("go")
    if go is None:
        raise FileNotFoundError(f"go is not installed, and neither PATH nor {cached(name).parent} has {name}")
    print(f"building {name} {version(name)} ...", file=sys.stderr, flush=True)
    folder, _, package = PROGRAMS[name]
    place = cached(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{name}")
    flags = ["-trimpath", "-ldflags", f"-s -w -X k8s.io/component-base/version.gitVersion=v{version(name)}"]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false"}
    command = [go, "build", *flags, "-o", str(draft), package]
    subprocess.run(command, cwd=_KUBERNETES / folder, env=environment, check=True, timeout=BUILD_S)
    draft.rename(place)


if __name__ == "__main__":
    for program, path in build().items():
        print(f"{program}: {path}")

"""The programs of a Kubernetes cluster: those on PATH, or built once from their Go modules into a cache by version.

Those on PATH count if the release fits: nothing older than what is built, in the same major version. The parts of
Kubernetes come from PATH all together and of one minor release, or not at all.
"""

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
#: How a program tells its version, where `--version` is not the way.
_ASKED = {"kubectl": ("version", "--client"), "helm": ("version", "--short"), "coredns": ("-version",)}
#: kube-apiserver 1.34 wants etcd 3.5.21 at least (its CHANGELOG).
_ETCD = (3, 5)
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
    """Return the programs: from PATH, or else from the cache, where what is missing is built, which takes long."""
    found = _kubernetes_on_path()
    for name in PROGRAMS:
        if name not in found:
            found[name] = cached(name) if PROGRAMS[name][0] == "binaries" else find(name)
            if not found[name].is_file():
                _build(name)
    return found


def find(program: str) -> Path:
    """Return one program: from PATH, or else from the cache, built first if it must be.

    Raises:
        FileNotFoundError: it is nowhere, and there is no Go to build it with.
    """
    if (path := shutil.which(program)) and _fits(program, path):
        return Path(path)
    if not cached(program).is_file():
        _build(program)
    return cached(program)


def _kubernetes_on_path() -> dict[str, Path]:
    """Return etcd and the parts of Kubernetes; nothing if one is missing, or they are not of one release that fits."""
    names = [name for name, (folder, _, _) in PROGRAMS.items() if folder == "binaries"]
    found = {name: path for name in names if (path := shutil.which(name))}
    if set(found) != set(names) or not all(_fits(name, path) for name, path in found.items()):
        return {}
    releases = {_release(name, path) for name, path in found.items() if name != "etcd"}
    return {name: Path(path) for name, path in found.items()} if len(releases) == 1 else {}


def _fits(program: str, path: str) -> bool:
    wanted = _ETCD if program == "etcd" else _numbers(version(program))
    release = _release(program, path)
    if wanted is None or release is None or release < wanted or release[0] != wanted[0]:
        print(f"{path} is not used: its release is {release}, and {wanted} or newer is wanted", file=sys.stderr)
        return False
    return True


def _release(program: str, path: str) -> tuple[int, int] | None:
    """Return the major and minor version that a program says it has; None if it says none."""
    command = [path, *_ASKED.get(program, ("--version",))]
    try:
        return _numbers(subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _numbers(text: str) -> tuple[int, int] | None:
    match = re.search(r"(\d+)\.(\d+)", text)
    return None if match is None else (int(match[1]), int(match[2]))


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

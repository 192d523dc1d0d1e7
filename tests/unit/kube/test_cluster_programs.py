"""Which programs a test cluster runs: those on PATH where their releases fit together, else those that were built."""

from __future__ import annotations

from pathlib import Path

import pytest

import kubernetes_binaries
from kubernetes_binaries import PROGRAMS

#: What each program says, for a release of Kubernetes.
_SAYS = {
    "etcd": "etcd Version: 3.6.4",
    "kubectl": "Client Version: v{0}\nKustomize Version: v5.7.1",
    "helm": "v3.19",
    "coredns": "CoreDNS-1.12.4\nlinux/amd64, go1.26.8,",
}


class Programs:
    """Scripts on PATH and in the cache."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "path"
        self.path.mkdir()
        for name in PROGRAMS:
            built = kubernetes_binaries.cached(name)
            built.parent.mkdir(parents=True, exist_ok=True)
            built.touch()

    def put(self, name: str, release: str = "1.34.9", says: str = "") -> None:
        text = (says or _SAYS.get(name, "Kubernetes v{0}")).format(release)
        script = self.path / name
        script.write_text(f"#!/bin/sh\ncat <<END\n{text}\nEND\n")
        script.chmod(0o755)

    def on_path(self) -> set[str]:
        """Return the programs that are taken from PATH; all others must be the built ones."""
        found = kubernetes_binaries.build()
        assert set(found) == set(PROGRAMS)
        taken = {name for name, path in found.items() if path == self.path / name}
        assert all(found[name] == kubernetes_binaries.cached(name) for name in set(PROGRAMS) - taken)
        return taken


KUBERNETES = {name for name, (folder, _, _) in PROGRAMS.items() if folder == "binaries"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}/path:/usr/bin:/bin")
    one = Programs(tmp_path)
    for name in PROGRAMS:
        one.put(name)
    return one


def test_those_on_path_are_used_where_all_fit(programs: Programs) -> None:
    assert programs.on_path() == set(PROGRAMS)


@pytest.mark.parametrize("release", ["1.33.5", "2.0.0"])
def test_another_release_is_not(programs: Programs, release: str, capsys: pytest.CaptureFixture[str]) -> None:
    programs.put("kubelet", release)
    assert programs.on_path() == {"helm", "coredns"}
    assert f"{programs.path}/kubelet is not used" in capsys.readouterr().err


def test_parts_of_two_releases_are_not_mixed(programs: Programs) -> None:
    programs.put("kube-proxy", "1.35.0")
    assert programs.on_path() == {"helm", "coredns"}
    for name in KUBERNETES:
        programs.put(name, "1.35.0")
    assert programs.on_path() == set(PROGRAMS)


def test_a_missing_part_has_all_parts_built(programs: Programs) -> None:
    (programs.path / "kube-scheduler").unlink()
    assert programs.on_path() == {"helm", "coredns"}


def test_what_says_no_version_is_not_used(programs: Programs) -> None:
    programs.put("helm", says="usage")
    assert programs.on_path() == KUBERNETES | {"coredns"}

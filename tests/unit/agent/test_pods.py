"""Pods: the cgroup paths of both drivers and both versions, what cannot be forged, and files of names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from remora.agent.pods import Pod, PodFiles, PodNames, of_pod, pod_of
from remora.errors import UnauthenticatedError

UID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
OTHER = "ffffffff-4b5a-6978-8796-a5b4c3d2e1f0"
UNDERSCORED = UID.replace("-", "_")
CONTAINER = "ab" * 32
BURSTABLE = "/kubepods.slice/kubepods-burstable.slice"
STATIC = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "pod"),
    [
        (f"0::/kubepods/burstable/pod{UID}/{CONTAINER}", Pod(UID, CONTAINER)),
        (f"0::/kubepods/pod{UID}/{CONTAINER}", Pod(UID, CONTAINER)),
        (f"0::/kubepods/besteffort/pod{STATIC}", Pod(STATIC)),
        (
            f"0::{BURSTABLE}/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-{CONTAINER}.scope",
            Pod(UID, CONTAINER),
        ),
        (f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{CONTAINER}.scope/nested", Pod(UID, CONTAINER)),
        (f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice:cri-containerd:{CONTAINER}", Pod(UID, CONTAINER)),
        (f"12:pids:/kubepods/burstable/pod{UID}/{CONTAINER}\n1:name=systemd:/\n", Pod(UID, CONTAINER)),
        (f"0::/kubepods/burstable/pod{UID}/{CONTAINER}/kubepods/pod{OTHER}/{CONTAINER}", Pod(UID, CONTAINER)),
        ("0::/user.slice/user-1000.slice/session-1.scope", None),
        ("0::/", None),
        ("", None),
    ],
)
def test_a_pod_is_found_by_its_cgroup(text: str, pod: Pod | None) -> None:
    assert pod_of(text) == pod


@pytest.mark.parametrize(
    "path",
    [
        f"/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{UNDERSCORED}.slice",
        f"/system.slice/kubepods/pod{UID}/{CONTAINER}",
        f"/kubepods/burstable/podx{UID}",
        f"/kubepods/burstable/pod{UID}x/{CONTAINER}",
        f"/kubepods-pod{UID}.slice",
    ],
)
def test_a_user_cannot_call_a_cgroup_of_his_own_a_pod(path: str) -> None:
    assert pod_of(f"0::{path}") is None


def test_what_cannot_be_known_is_refused() -> None:
    with pytest.raises(UnauthenticatedError, match="cgroup namespace"):
        pod_of(f"0::/../../pod{UID}/{CONTAINER}")
    with pytest.raises(UnauthenticatedError, match="several pods"):
        pod_of(f"2:pids:/kubepods/pod{UID}\n1:memory:/kubepods/pod{OTHER}")


def test_a_pod_is_a_tenant_of_its_own_unless_its_file_names_one() -> None:
    assert of_pod(Pod(UID), None).tenant == of_pod(Pod(UID), None).key == f"pod:{UID}"
    named = of_pod(Pod(UID), PodNames("prod", "web-1", "acme", {"tier": "gold", "namespace": "forged"}))
    assert (named.key, named.tenant, named.sandbox) == (f"pod:{UID}", "tenant:acme", "prod/web-1")
    assert named.labels == {"tier": "gold", "namespace": "prod", "pod": "web-1", "uid": UID}


def test_names_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    names = PodFiles(tmp_path)
    assert names(UID) is None
    path = tmp_path / f"{UID}.json"
    path.write_text(json.dumps({"namespace": "a", "name": "b"}))
    assert names(UID) == names(UID) == PodNames("a", "b")
    other = tmp_path / "new"
    other.write_text(json.dumps({"namespace": "c", "name": "b", "tenant": "t", "labels": {"x": "y"}}))
    other.rename(path)
    assert names(UID) == PodNames("c", "b", "t", {"x": "y"})
    path.unlink()
    assert names(UID) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"labels": {"a": 1}}', '{"tenant": "../x"}', '{"labels": []}x', '{"name": 3}', "[" * 100000],
)
def test_a_file_that_makes_no_sense_keeps_its_pod_out(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{UID}.json").write_text(text)
    with pytest.raises(UnauthenticatedError, match=UID):
        PodFiles(tmp_path)(UID)


def test_a_file_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / f"{UID}.json"
    path.write_text("{}")
    path.chmod(0o666)
    with pytest.raises(UnauthenticatedError, match="chmod go-w"):
        PodFiles(tmp_path)(UID)
    path.unlink()
    os.symlink("/etc/hostname", path)
    with pytest.raises(UnauthenticatedError, match="not usable"):
        PodFiles(tmp_path)(UID)

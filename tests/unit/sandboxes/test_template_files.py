"""A template's files: whole or not there, tied to its host, and swept when their maker was killed."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from remora.errors import DataLossError, FailedPreconditionError, NotFoundError, ResourceExhaustedError
from remora.sandboxes import templates
from remora.sandboxes.options import Options
from remora.sandboxes.template_files import vm_to_json
from remora.sandboxes.templates import Templates
from remora.vmm.contract import Disk, VmSpec


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Templates:
    monkeypatch.setattr(templates, "vmm_version", lambda _name, _state_dir: "7.2.22")
    monkeypatch.setattr(templates, "host_tsc_khz", lambda _cache_dir: 2_596_128)
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path / "run"))
    return Templates(tmp_path)


def write(store: Templates, name: str, **changes: Any) -> Path:
    directory = store.root / name
    directory.mkdir(parents=True)
    vm = VmSpec(
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        arguments="quiet",
        memory_mib=256,
        cpus=1,
        accelerator="tcg",
        disks=(Disk("remora-os", directory / "d00"),),
        ram_file=directory / "ram",
        ram_private=True,
        incoming=True,
    )
    spec = {
        "format": 2,
        "sandbox": "0123456789ab",
        "vm": vm_to_json(vm),
        "vmm": "qemu",
        "vmm_version": "7.2.22",
        "tsc_khz": 2_596_128,
        "accelerator": True,
        "created_s": 1.0,
        "fields": {"image": "f:latest"},
        **changes,
    }
    for file in ("kernel", "initrd", "d00", "ram", "state", "lock"):
        (directory / file).write_bytes(b"")
    (directory / "spec.json").write_text(json.dumps(spec))
    return directory


def test_a_template_is_read_back_with_its_own_files(store: Templates) -> None:
    directory = write(store, "t")
    with store.use("t") as stored:
        assert stored.vm.disks == (Disk("remora-os", directory / "d00"),)
        assert (stored.vm.ram_file, stored.vm.ram_private, stored.vm.incoming) == (directory / "ram", True, True)
        assert stored.sandbox == "0123456789ab"


def test_a_missing_template_names_those_that_exist(store: Templates) -> None:
    write(store, "lamp")
    with pytest.raises(NotFoundError, match="there are: lamp"), store.use("nosuch"):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vmm_version": "8.0.0"}, r"saved by QEMU 8\.0\.0 and this host has 7\.2\.22"),
        ({"tsc_khz": 3_000_000}, "its clock would run wrong"),
        ({"format": 99}, "another version of Remora"),
    ],
)
def test_a_template_that_this_host_cannot_restore_says_how_to_make_it_again(
    store: Templates, changes: dict[str, Any], words: str
) -> None:
    write(store, "t", **changes)
    with pytest.raises(FailedPreconditionError, match=words) as caught, store.use("t"):
        pass
    assert caught.value.fix == "make it again: remora template remove t && remora template create t f:latest"


def test_a_damaged_template_is_reported(store: Templates) -> None:
    directory = write(store, "t")
    (directory / "ram").unlink()
    with pytest.raises(DataLossError, match="remora template remove t"), store.use("t"):
        pass


def test_a_template_that_cannot_fit_is_refused_before_anything_boots(
    store: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs("/")
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((*full[:4], 0, *full[5:10])))
    with pytest.raises(ResourceExhaustedError, match=r"needs as much disk, and .* has 0 MiB left"):
        store.create("t", Options(image="f"))


def test_a_template_in_use_is_not_removed(store: Templates) -> None:
    write(store, "t")
    with store.use("t"), pytest.raises(FailedPreconditionError, match="still run"):
        store.remove("t")
    store.remove("t")
    assert list(store.root.iterdir()) == []


def test_what_a_killed_maker_left_is_swept_and_what_a_living_one_makes_is_not(store: Templates) -> None:
    for name in (".new-dead", ".new-alive"):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "lock").write_text("")
    held = os.open(store.root / ".new-alive" / "lock", os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.sweep()
        assert [path.name for path in store.root.iterdir()] == [".new-alive"]
    finally:
        os.close(held)

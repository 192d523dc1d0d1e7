"""The store between processes: sharing, holding, collecting, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from image_maker import Layout, member, tar
from remora.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from remora.images.importer import import_image
from remora.images.model import Image, ImageConfig, full_name
from remora.images.store import ImageStore

SHARED = tar(member("shared", b"s" * 5000))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def _add(store: ImageStore, tmp_path: Path, name: str, own: bytes) -> Image:
    layout = Layout(tmp_path / f"layout-{name}")
    return import_image(store, layout.index(layout.image([SHARED, tar(member("own", own))])), name=name)


def test_an_empty_store_lists_nothing_and_helps(store: ImageStore) -> None:
    assert store.list() == []
    with pytest.raises(NotFoundError, match=r"no image is called tool:latest; there are: none yet .*remora image"):
        store.get("tool")
    with pytest.raises(NotFoundError):
        store.remove("tool")


def test_removing_an_image_frees_only_what_no_other_needs(store: ImageStore, tmp_path: Path) -> None:
    a, b = _add(store, tmp_path, "a", b"1"), _add(store, tmp_path, "b", b"2")
    own_bytes = a.layers[1].stat().st_size
    assert store.remove("a") == own_bytes
    assert [image.name for image in store.list()] == ["b:latest"]
    assert all(layer.exists() for layer in b.layers)
    store.remove("b:latest")
    assert list(store.layers_dir.iterdir()) == []


def test_an_image_in_use_is_not_removed(store: ImageStore, tmp_path: Path) -> None:
    image = _add(store, tmp_path, "a", b"1")
    with store.hold(image):
        with pytest.raises(FailedPreconditionError, match=r"a:latest is in use.*stop it first"):
            store.remove("a")
        assert store.get("a") == image
    store.remove("a")


def test_a_shared_layer_in_use_does_not_keep_another_image(store: ImageStore, tmp_path: Path) -> None:
    a, _ = _add(store, tmp_path, "a", b"1"), _add(store, tmp_path, "b", b"2")
    with store.hold(a):
        store.remove("b")
    assert [image.name for image in store.list()] == ["a:latest"]


def test_an_image_that_is_gone_cannot_be_held(store: ImageStore, tmp_path: Path) -> None:
    image = _add(store, tmp_path, "a", b"1")
    store.remove("a")
    with pytest.raises(NotFoundError, match="was removed"), store.hold(image):
        pass


def test_replacing_a_name_collects_the_old_layers_once_nobody_holds_them(store: ImageStore, tmp_path: Path) -> None:
    old = _add(store, tmp_path, "a", b"1")
    with store.hold(old):
        (tmp_path / "layout-a").rename(tmp_path / "used")
        new = _add(store, tmp_path, "a", b"2")
        assert old.layers[1].exists()
    with store.adding():
        pass
    assert not old.layers[1].exists()
    assert all(layer.exists() for layer in new.layers)


def test_a_holder_that_dies_holds_nothing(store: ImageStore, tmp_path: Path) -> None:
    _add(store, tmp_path, "a", b"1")
    script = (
        "import sys, pathlib; from remora.images.store import ImageStore\n"
        "s = ImageStore(pathlib.Path(sys.argv[1]))\n"
        "with s.hold(s.get('a')): print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FailedPreconditionError):
            store.remove("a")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    store.remove("a")


def test_what_a_killed_process_was_making_is_swept(store: ImageStore) -> None:
    script = (
        "import sys, os, signal, pathlib; from remora.images.store import ImageStore\n"
        "def die(file): file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "with ImageStore(pathlib.Path(sys.argv[1])).adding() as adding:\n"
        "    (adding.scratch_dir() / 'sub').mkdir()\n"
        "    adding.layer('sha256:' + '1' * 64, die)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(store.tmp_dir.iterdir()) != []
    assert list(store.layers_dir.iterdir()) == []
    with store.adding():
        assert list(store.tmp_dir.iterdir()) == []


def test_work_in_progress_is_not_swept(store: ImageStore) -> None:
    with store.adding() as first:
        scratch = first.scratch_dir()
        (scratch / "f").write_text("x")
        with store.adding():
            pass
        assert (scratch / "f").read_text() == "x"
    assert not scratch.exists()


def test_two_who_want_the_same_layer_make_it_once(store: ImageStore) -> None:
    made: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def write(out: BinaryIO) -> None:
        made.append(threading.current_thread().name)
        inside.set()
        assert go_on.wait(10)
        out.write(b"layer")

    def add() -> None:
        with store.adding() as adding:
            path = adding.layer("sha256:" + "2" * 64, write)
            assert path.read_bytes() == b"layer"

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert inside.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    # A thread that came after the others had ended found the layer collected, as no image had been committed.
    assert 1 <= len(made) <= 4
    assert list(store.layers_dir.iterdir()) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        store = ImageStore(small / "images")
        layout = Layout(tmp_path / "layout")
        path = layout.index(layout.image([tar(member("big", os.urandom(4_000_000)))]))
        with pytest.raises(ResourceExhaustedError, match=r"no space left on the disk of .*REMORA_STATE_DIR"):
            import_image(store, path, name="big")
        assert [p.name for p in store.root.rglob("*") if p.is_file()] == ["lock"]
        del store
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_damaged_record_is_named(store: ImageStore, tmp_path: Path) -> None:
    image = _add(store, tmp_path, "a", b"1")
    image.layers[0].unlink()
    with pytest.raises(DataLossError, match="is missing"):
        store.get("a")
    record = next((store.root / "records").iterdir())
    record.write_text("{")
    with pytest.raises(DataLossError, match=f"{record.name} is damaged"):
        store.get("a")


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("tool", "tool:latest"),
        ("team/tool:1.2-x", "team/tool:1.2-x"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("registry.example.org/a__b", "registry.example.org/a__b:latest"),
    ],
)
def test_names_get_a_tag(given: str, full: str) -> None:
    assert full_name(given) == full


@pytest.mark.parametrize("name", ["", "UPPER", "../etc", "a b", "a:", "a:b:c", "/abs", "a//b", "x" * 300, "a:tag/x"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no image name"):
        full_name(name)


def test_a_configuration_survives_its_record(store: ImageStore) -> None:
    config = ImageConfig(("a",), ("b", "c"), {"K": "v"}, "/w", "u:g", {"l": "1"}, ("80/tcp",), "SIGINT")
    with store.adding() as adding:
        adding.layer("sha256:" + "3" * 64, lambda out: out.write(b"x"))
        adding.commit("x", "sha256:" + "4" * 64, ("sha256:" + "3" * 64,), config, "amd64", "")
    assert store.get("x").config == config

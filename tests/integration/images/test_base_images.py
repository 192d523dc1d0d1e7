"""A function's image from Debian packages and requirements, built by the real tools."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from image_maker import describe
from remora.errors import RemoraError, ResourceExhaustedError, UnavailableError
from remora.images.base import debian_base
from remora.images.build import build_image
from remora.images.erofs_read import ErofsReader
from remora.images.model import Image
from remora.images.recipe import load_recipe
from remora.images.store import ImageStore

pytestmark = [
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]
EXAMPLE = Path(__file__).parents[3] / "examples/classify"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("state") / "images")


@pytest.fixture(scope="module")
def example(store: ImageStore) -> Image:
    return build_image(store, EXAMPLE)


def test_the_example_is_small_and_complete(example: Image) -> None:
    assert example.size_bytes < 60_000_000
    found = {}
    for layer in example.layers:
        found.update(describe(layer))
    for path in (
        "/usr/bin/python3",
        "/bin/sh",
        "/etc/passwd",
        "/srv/function.py",
        "/usr/lib/python3.11/json/__init__.py",
    ):
        assert path in found or path.replace("3.11", "3.12") in found or f"/usr{path}" in found, path
    for absent in ("/etc/resolv.conf", "/etc/hostname", "/etc/apt/sources.list", "/usr/share/man", "/usr/share/locale"):
        assert absent not in found


def test_the_base_is_made_once(store: ImageStore, example: Image) -> None:
    recipe = load_recipe(EXAMPLE)
    assert recipe.suite is not None
    steps: list[str] = []
    base = debian_base(
        store, recipe.suite, recipe.variant, recipe.packages, progress=lambda step, done, total: steps.append(step)
    )
    assert steps == []
    assert base.layers == example.layers[: len(base.layers)]


def test_equal_packages_give_equal_bytes(tmp_path: Path, example: Image) -> None:
    other = build_image(ImageStore(tmp_path / "images"), EXAMPLE)
    assert (other.digest, other.diff_ids) == (example.digest, example.diff_ids)
    for one, two in zip(other.layers, example.layers, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_its_python_runs(tmp_path: Path, example: Image) -> None:
    root = tmp_path / "root"
    root.mkdir()
    done = subprocess.run(
        ["mount", "-t", "erofs", "-o", "loop,ro", example.layers[0], root], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount erofs here: {done.stderr.strip()}")
    try:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        script = "import asyncio, json, socket; print(json.__cached__)"
        command = ["chroot", str(root), "/usr/bin/python3", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        with ErofsReader(example.layers[0]) as reader:
            assert reader.lookup(done.stdout.strip()) is not None
        shell = subprocess.run(["chroot", str(root), "sh", "-c", "exit 7"], check=False, env=environment)
        assert shell.returncode == 7
    finally:
        subprocess.run(["umount", root], check=True)


def test_an_unknown_package_is_named_and_leaves_nothing(store: ImageStore, example: Image) -> None:
    recipe = load_recipe(EXAMPLE)
    assert recipe.suite is not None
    before = [image.name for image in store.list()]
    with pytest.raises(UnavailableError, match=r"Unable to locate package no-such-package"):
        debian_base(store, recipe.suite, "minimal", ("no-such-package",))
    assert [image.name for image in store.list()] == before
    assert list(store.tmp_dir.iterdir()) == []


def test_a_killed_build_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    script = (
        "import sys, pathlib\n"
        "from remora.images.base import debian_base\n"
        "from remora.images.store import ImageStore\n"
        "def progress(step, done, total): print(step, flush=True)\n"
        "suite = sys.argv[2]\n"
        "debian_base(ImageStore(pathlib.Path(sys.argv[1])), suite, 'minimal', (), progress=progress)\n"
    )
    suite = load_recipe(EXAMPLE).suite
    assert suite is not None
    with subprocess.Popen(
        [sys.executable, "-c", script, str(store.root), suite], stdout=subprocess.PIPE, text=True
    ) as build:
        assert build.stdout is not None
        for line in build.stdout:
            if "downloading" in line:
                break
        helpers = psutil.Process(build.pid).children(recursive=True)
        assert helpers
        build.kill()
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert alive == []
    with store.adding():
        assert list(store.tmp_dir.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize(("size_mib", "filled_mib"), [(3, 0), (230, 29)], ids=["from the start", "on the way"])
def test_a_full_disk_is_said_at_once_and_nothing_is_left(tmp_path: Path, size_mib: int, filled_mib: int) -> None:
    suite = load_recipe(EXAMPLE).suite
    assert suite is not None
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(tmp_path)], check=True)
    try:
        (tmp_path / "filler").write_bytes(bytes(filled_mib << 20))
        store = ImageStore(tmp_path / "images")
        began_s = time.monotonic()
        with pytest.raises(ResourceExhaustedError, match=r"too little space .* 200 MiB .*REMORA_STATE_DIR"):
            debian_base(store, suite, "minimal", ("python3-minimal", "libpython3-stdlib"))
        assert time.monotonic() - began_s < 30
        assert store.list() == []
        assert list(store.tmp_dir.iterdir()) == []
        inside = [
            one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())
        ]
        assert inside == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root")
def test_what_does_not_end_by_itself_ends_with_who_started_it(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; sleep 1000 & echo $! > pid; wait"
    call = f"subprocess.run(contained(['sh', '-c', {stubborn!r}]))"
    starter = f"import subprocess\nfrom remora.images.tools import contained\n{call}"
    with subprocess.Popen([sys.executable, "-c", starter], cwd=tmp_path) as process:
        deadline_s = time.monotonic() + 20
        while not (helpers := psutil.Process(process.pid).children(recursive=True)) or not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        helpers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert alive == []


def _wheel(directory: Path) -> Path:
    path = directory / "tinypkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinypkg.py", "VALUE = 42\n")
        info = "tinypkg-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("right_hash", [True, False])
def test_requirements_are_installed_for_the_image_s_python_and_hashes_honoured(
    store: ImageStore, example: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right_hash: bool
) -> None:
    wheel = _wheel(tmp_path)
    digest = hashlib.sha256(wheel.read_bytes() if right_hash else b"").hexdigest()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    function = tmp_path / "function"
    function.mkdir()
    (function / "requirements.txt").write_text(f"tinypkg==1.0 --hash=sha256:{digest}\n")
    (function / "remora.toml").write_text('[image]\nbase = "classify"\n[python]\nrequirements = "requirements.txt"\n')
    if not right_hash:
        with pytest.raises(RemoraError, match=r"pip could not install .*"):
            build_image(store, function)
        return
    image = build_image(store, function)
    found = describe(image.layers[-1])
    placed = [name for name in found if name.endswith("/tinypkg.py")]
    assert len(placed) == 1
    assert placed[0].startswith("/usr/local/lib/python3.")
    if f"/python3.{sys.version_info.minor}/" in placed[0]:
        assert any("__pycache__/tinypkg" in name for name in found)
    assert image.layers[:-1] == example.layers
    (function / "requirements.txt").touch()
    assert build_image(store, function).digest == image.digest

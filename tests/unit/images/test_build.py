"""Building from files on a base: placement, owners, configuration, and equal bytes for equal input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from image_maker import Layout, describe, directory, member, symlink, tar
from remora.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from remora.images.build import build_image
from remora.images.importer import import_image
from remora.images.requirements import image_python
from remora.images.store import ImageStore
from remora.images.tree_tar import LowerLayers

BASE = tar(
    directory("usr"),
    directory("usr/bin"),
    symlink("bin", "usr/bin"),
    symlink("sbin", "/bin"),
    directory("tmp", 0o1777, mtime=77),
    directory("srv/own", 0o700, uid=5, gid=6),
    member("usr/bin/python3.11", b"elf"),
    symlink("loop", "loop"),
)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    layout = Layout(tmp_path / "base")
    config: dict[str, object] = {"Env": ["PATH=/bin", "A=base"], "Cmd": ["sh"], "User": "7", "Labels": {"l": "base"}}
    import_image(store, layout.index(layout.image([BASE], config=config)), name="base")
    return store


def _function(tmp_path: Path, recipe: str) -> Path:
    function = tmp_path / "function"
    (function / "package/__pycache__").mkdir(parents=True)
    (function / "package/__pycache__/x.pyc").write_bytes(b"")
    (function / "package/module.py").write_text("x = 1\n")
    (function / "package/link").symlink_to("module.py")
    (function / "tool").write_text("#!/bin/sh\n")
    (function / "tool").chmod(0o700)
    (function / "remora.toml").write_text(recipe)
    return function


RECIPE = """
[image]
base = "base"
[files]
"/bin/tool" = "tool"
"/sbin/tool2" = "tool"
"/tmp/tool" = "tool"
"/srv/own/package" = "package"
"/new/dir/" = "package"
[run]
cmd = ["tool"]
env = { A = "own" }
"""


def test_files_go_where_the_base_leads_them(store: ImageStore, tmp_path: Path) -> None:
    image = build_image(store, _function(tmp_path, RECIPE))
    assert image.name == "function:latest"
    found = describe(image.layers[-1])
    assert "/bin" not in found  # it would hide the base's link on a merged system
    assert found["/usr/bin/tool"][:3] == ("-rwxr-xr-x", 0, 0)
    assert found["/usr/bin/tool2"][4] == b"#!/bin/sh\n"
    assert found["/tmp"][:4] == ("drwxrwxrwt", 0, 0, 77)
    assert found["/srv/own"][:3] == ("drwx------", 5, 6)
    assert found["/srv/own/package/link"][4] == b"module.py"
    assert found["/new/dir/module.py"][:3] == ("-rw-r--r--", 0, 0)
    assert not any("__pycache__" in name for name in found)


def test_the_recipe_is_laid_over_the_base_s_configuration(store: ImageStore, tmp_path: Path) -> None:
    config = build_image(store, _function(tmp_path, RECIPE)).config
    assert dict(config.env) == {"PATH": "/bin", "A": "own"}
    assert (config.cmd, config.user, dict(config.labels)) == (("tool",), "7", {"l": "base"})


def test_equal_input_gives_equal_images(store: ImageStore, tmp_path: Path) -> None:
    function = _function(tmp_path, RECIPE)
    first = build_image(store, function, name="a")
    for path in function.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    second = build_image(store, function, name="b")
    assert (first.digest, first.layers) == (second.digest, second.layers)
    (function / "tool").write_text("changed")
    assert build_image(store, function, name="c").digest != first.digest


def test_scratch_holds_only_the_files(store: ImageStore, tmp_path: Path) -> None:
    image = build_image(store, _function(tmp_path, '[image]\nbase = "scratch"\n[files]\n"/tool" = "tool"\n'))
    assert len(image.layers) == 1
    assert set(describe(image.layers[0])) == {"/", "/tool"}


@pytest.mark.parametrize(
    ("recipe", "error", "complaint"),
    [
        ('[image]\nbase = "absent"\n', NotFoundError, "no image is called absent:latest; there are: base:latest"),
        ('[image]\nbase = "scratch"\n', InvalidArgumentError, "empty image"),
        ('[image]\nbase = "base"\n[python]\nrequirements = "r.txt"\n', InvalidArgumentError, "there is no .*r.txt"),
        ('[image]\nbase = "base"\n[files]\n"/loop/x" = "tool"\n', InvalidArgumentError, "circle"),
        (
            '[image]\nbase = "scratch"\n[python]\nrequirements = "tool"\n',
            FailedPreconditionError,
            "no Python .*python3-minimal",
        ),
    ],
)
def test_what_cannot_be_built_says_why(
    store: ImageStore, tmp_path: Path, recipe: str, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        build_image(store, _function(tmp_path, recipe))
    assert [image.name for image in store.list()] == ["base:latest"]


def test_the_python_of_an_image_is_found(store: ImageStore) -> None:
    with LowerLayers(store.get("base").layers) as lower:
        assert image_python(lower) == ("3.11", "/usr/local/lib/python3.11/dist-packages")

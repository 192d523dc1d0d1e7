"""Merging layers shows what overlayfs would show of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_maker import Layout, convert, describe, directory, member, symlink, tar
from remora.errors import InvalidArgumentError
from remora.images.erofs_read import ErofsReader
from remora.images.flatten import flatten, merge_layers
from remora.images.importer import import_image
from remora.images.store import ImageStore

LAYERS = (
    tar(directory("d", 0o700), member("d/a", b"1"), member("d/b", b"1" * 9000), member("f", b"1"), member("o/x", b"1")),
    tar(directory("d", 0o755), member("d/.wh.a"), member("d/c", b"2"), symlink("f", "d/c"), member("o/.wh..wh..opq")),
    tar(member("g", b"3"), member("h", kind=b"1", target="g"), member("o/y", b"3"), directory("d/b")),
)
SHOWN = {"/", "/d", "/d/b", "/d/c", "/f", "/g", "/h", "/o", "/o/y"}


def test_the_merged_layer_shows_what_the_stack_shows(tmp_path: Path) -> None:
    layers = tuple(convert(data, tmp_path / str(number)) for number, data in enumerate(LAYERS))
    with open(tmp_path / "merged", "w+b") as out:
        merge_layers(layers, out, b"u" * 16)
    found = describe(tmp_path / "merged")
    assert set(found) == SHOWN
    assert found["/d"][0] == "drwxr-xr-x"
    assert found["/d/b"][0] == "drwxr-xr-x"  # a directory over a file
    assert found["/f"][4] == b"d/c"
    assert not any(row[5] for row in found.values())
    with ErofsReader(tmp_path / "merged") as reader:
        g, h = reader.lookup("/g"), reader.lookup("/h")
        assert g is not None
        assert h is not None
        assert (g.nid, g.links) == (h.nid, 2)


def test_an_image_is_flattened_only_as_far_as_needed(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    layout = Layout(tmp_path / "layout")
    image = import_image(store, layout.index(layout.image(LAYERS)), name="x")
    assert flatten(store, image, 3) is image
    two = flatten(store, image, 2)
    assert two.layers[1] == image.layers[2]
    one = flatten(store, image, 1)
    assert set(describe(one.layers[0])) == SHOWN
    assert flatten(store, image, 1) == one
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        flatten(store, image, 0)
    with store.hold(two):
        store.get("x")
    store.remove("x")
    assert list(store.layers_dir.iterdir()) == []
    assert list((store.root / "merged").iterdir()) == []

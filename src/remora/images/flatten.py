"""Merges the lowest layers of an image into one when it has more layers than a microVM has disks to give.

A virtio-mmio machine has a few dozen slots at most and the guest OS, the writable disk and the channel want some. The
merged layer is kept in the store under a digest of what it stands for, so that each image pays once; the layers it was
made of stay, since other images share them.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from remora.errors import InvalidArgumentError
from remora.images.erofs import ErofsWriter, Node
from remora.images.erofs_read import ErofsReader
from remora.images.layer import OPAQUE_XATTR, is_whiteout
from remora.images.model import Image
from remora.images.store import ImageStore


def flatten(store: ImageStore, image: Image, max_layers: int) -> Image:
    """Return `image` with at most `max_layers` layers, the lower ones merged. Hold what comes back, not `image`."""
    if max_layers < 1:
        raise InvalidArgumentError(f"max_layers is {max_layers}; at least 1 is needed")
    if len(image.layers) <= max_layers:
        return image
    count = len(image.layers) - max_layers + 1
    lower, upper = image.layers[:count], image.layers[count:]
    parts = image.diff_ids[:count]
    digest = hashlib.sha256("\n".join(["remora merged layer 1", *parts]).encode()).hexdigest()
    with store.hold(image), store.adding() as adding:
        merged = adding.merged_layer(f"sha256:{digest}", parts, _merger(lower, bytes.fromhex(digest)[:16]))
    return replace(image, layers=(merged, *upper))


def _merger(layers: tuple[Path, ...], uuid: bytes) -> Callable[[BinaryIO], object]:
    def write(out: BinaryIO) -> None:
        merge_layers(layers, out, uuid)

    return write


def merge_layers(layers: tuple[Path, ...], out: BinaryIO, uuid: bytes) -> int:
    """Write to `out` what overlayfs would show of `layers` (the lowest first), and return its size.

    Whiteouts and opaque marks are gone in the result: there is nothing below it that they could hide.
    """
    with ExitStack() as stack:
        owner: dict[int, ErofsReader] = {}
        root: Node | None = None
        for layer in layers:
            reader = stack.enter_context(ErofsReader(layer))
            top = reader.tree()
            _claim(top, reader, owner)
            root = top if root is None else root
            if root is not top:
                _lay_over(root, top)
        if root is None:
            raise InvalidArgumentError("there are no layers to merge")
        _drop_marks(root)
        writer = ErofsWriter(out)
        copied: set[int] = set()
        for node in _files(root):
            if stat.S_IFMT(node.mode) in (stat.S_IFREG, stat.S_IFLNK) and id(node) not in copied:
                copied.add(id(node))
                reader = owner[id(node)]
                writer.add_data(node, reader.data(_snapshot(node)))
        return writer.finish(root, uuid)


def _claim(root: Node, reader: ErofsReader, owner: dict[int, ErofsReader]) -> None:
    for node in _files(root):
        owner[id(node)] = reader


def _files(root: Node) -> list[Node]:
    """Every node but directories and whiteouts, hard links as often as they have names."""
    found = []
    stack = [root]
    while stack:
        node = stack.pop()
        for _, child in sorted(node.children.items(), reverse=True):
            if child.is_dir:
                stack.append(child)
            elif not is_whiteout(child):
                found.append(child)
    return found


def _lay_over(lower: Node, upper: Node) -> None:
    """Change `lower` to what shows when `upper` lies over it."""
    pairs = [(lower, upper)]
    while pairs:
        below, above = pairs.pop()
        for field in ("mode", "uid", "gid", "mtime_s", "mtime_ns", "xattrs"):
            setattr(below, field, getattr(above, field))
        if OPAQUE_XATTR in above.xattrs:
            below.children.clear()
        for name, node in above.children.items():
            present = below.children.get(name)
            if is_whiteout(node):
                below.children.pop(name, None)
            elif node.is_dir and present is not None and present.is_dir:
                pairs.append((present, node))
            else:
                below.children[name] = node


def _drop_marks(root: Node) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        node.xattrs.pop(OPAQUE_XATTR, None)
        for name, child in list(node.children.items()):
            if child.is_dir:
                stack.append(child)
            elif is_whiteout(child):
                del node.children[name]


def _snapshot(node: Node) -> Node:
    """A copy with the place of its content in its old image, since `add_data` gives the node its new one."""
    copy = Node(node.mode)
    copy.size_bytes, copy.block, copy.tail = node.size_bytes, node.block, node.tail
    return copy

"""Turns one tar layer of an image into an EROFS layer, and refuses what a hostile archive could try.

No member is ever written to the host's file system under its own name, so a path cannot escape; still `..`, paths
through links and links to nowhere are errors, because the guest would see something else than the author meant.

Whiteouts (OCI image-spec, layer.md) become what overlayfs wants (Documentation/filesystems/overlayfs.rst): `.wh.NAME`
a character device 0:0, `.wh..wh..opq` the attribute trusted.overlay.opaque on its directory. They hide only what lies
below the layer, so a NAME that the same layer also brings stays. Other device nodes are left out: the guest has a
devtmpfs of its own, and 0:0 in an archive would be a forged whiteout.
"""

from __future__ import annotations

import stat
from typing import BinaryIO

from remora.errors import InvalidArgumentError
from remora.images.erofs import ErofsWriter, Node
from remora.images.limits import DEFAULT_LIMITS, Limits
from remora.images.tarstream import Readable, TarEntry, TarReader

OPAQUE_XATTR = b"trusted.overlay.opaque"
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_TYPES = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO}


def whiteout() -> Node:
    """Return the node by which overlayfs hides a name of the layers below."""
    return Node(stat.S_IFCHR)


def is_whiteout(node: Node) -> bool:
    """True for the character device 0:0."""
    return stat.S_ISCHR(node.mode) and node.block == 0


def write_layer(stream: Readable, out: BinaryIO, uuid: bytes, limits: Limits = DEFAULT_LIMITS) -> int:
    """Convert the uncompressed tar `stream` to an EROFS image in `out`; return its size in bytes.

    Raises:
        InvalidArgumentError: the archive is malformed or hostile; the message names the member.
        ResourceExhaustedError: it exceeds `limits`.
    """
    writer = ErofsWriter(out)
    tree = LayerTree(writer)
    reader = TarReader(stream, limits)
    for count, entry in enumerate(reader, 1):
        if count > limits.max_entries:
            raise InvalidArgumentError(f"the layer has more than {limits.max_entries} members, the limit")
        tree.add(entry, reader)
    return writer.finish(tree.finished_root(), uuid)


class LayerTree:
    """The tree that a sequence of members builds; a later member replaces an earlier one of the same path."""

    def __init__(self, writer: ErofsWriter) -> None:
        self._writer = writer
        self._root = Node(stat.S_IFDIR | 0o755)
        self._whiteouts: list[tuple[Node, bytes]] = []

    def add(self, entry: TarEntry, reader: TarReader) -> None:
        """Take one member; its content is read from `reader`."""
        parts = _parts(entry.path)
        if not parts:
            if entry.kind == "dir":
                _describe(self._root, entry)
            return
        parent = self._directory(parts[:-1], entry)
        name = parts[-1]
        if name.startswith(_WHITEOUT):
            self._hide(parent, name, entry)
        elif entry.kind == "link":
            parent.children[name] = self._link_target(entry)
        elif entry.kind in _TYPES:
            self._put(parent, name, entry, reader)

    def finished_root(self) -> Node:
        """Apply the whiteouts and return the root."""
        for parent, name in self._whiteouts:
            own = parent.children.get(name)
            if own is None:
                parent.children[name] = whiteout()
            elif own.is_dir:
                own.xattrs[OPAQUE_XATTR] = b"y"
        return self._root

    def _put(self, parent: Node, name: bytes, entry: TarEntry, reader: TarReader) -> None:
        present = parent.children.get(name)
        if entry.kind == "dir" and present is not None and present.is_dir:
            _describe(present, entry)
            return
        node = Node(_TYPES[entry.kind])
        _describe(node, entry)
        if entry.kind == "file":
            self._writer.add_data(node, reader.data())
        elif entry.kind == "symlink":
            if not entry.target:
                raise InvalidArgumentError(f"the symbolic link {_shown(entry.path)} of the layer has no target")
            self._writer.add_data(node, [entry.target])
        parent.children[name] = node

    def _hide(self, parent: Node, name: bytes, entry: TarEntry) -> None:
        if name == _OPAQUE:
            parent.xattrs[OPAQUE_XATTR] = b"y"
        elif name.startswith(_WHITEOUT * 2):
            return  # bookkeeping of aufs, never content
        elif (hidden := name[len(_WHITEOUT) :]) in (b"", b".", b".."):
            raise InvalidArgumentError(f"the whiteout {_shown(entry.path)} of the layer hides nothing")
        else:
            self._whiteouts.append((parent, hidden))

    def _directory(self, parts: list[bytes], entry: TarEntry) -> Node:
        node = self._root
        for part in parts:
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = Node(stat.S_IFDIR | 0o755)
            elif not child.is_dir:
                what = "a symbolic link" if stat.S_ISLNK(child.mode) else "not a directory"
                raise InvalidArgumentError(
                    f"the member {_shown(entry.path)} of the layer goes through {_shown(part)}, which is {what}"
                )
            node = child
        return node

    def _link_target(self, entry: TarEntry) -> Node:
        node: Node | None = self._root
        for part in _parts(entry.target):
            node = node.children.get(part) if node is not None else None
        if node is None or node.is_dir:
            raise InvalidArgumentError(
                f"the hard link {_shown(entry.path)} of the layer names {_shown(entry.target)}, no earlier file of it"
            )
        return node


def _parts(path: bytes) -> list[bytes]:
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidArgumentError(f"the path {_shown(path)} in the layer climbs out with '..'")
    return parts


def _describe(node: Node, entry: TarEntry) -> None:
    node.mode = stat.S_IFMT(node.mode) | (0o777 if entry.kind == "symlink" else entry.mode)
    node.uid, node.gid = entry.uid, entry.gid
    node.mtime_s, node.mtime_ns = entry.mtime_s, entry.mtime_ns
    opaque = node.xattrs.get(OPAQUE_XATTR)
    node.xattrs = {key: value for key, value in entry.xattrs.items() if _kept(key)}
    if opaque is not None:
        node.xattrs[OPAQUE_XATTR] = opaque


def _kept(xattr: bytes) -> bool:
    """overlayfs takes orders from trusted.overlay.* and user.overlay.*: an archive may give none."""
    if xattr.startswith(b"user.overlay."):
        return False
    return xattr.startswith((b"user.", b"security.", b"system.posix_acl_"))


def _shown(path: bytes) -> str:
    text = path.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 120 else text[:117] + "...")

"""Reads back the EROFS images that `erofs.ErofsWriter` makes: to merge layers, and to look into a base image.

Not a general reader: it knows extended inodes with flat or inline data, and says so when an image has others.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from remora.errors import DataLossError
from remora.images.erofs import (
    BLOCK,
    DIRENT,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE,
    MAGIC,
    SLOT,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    XATTR_PREFIXES,
    Node,
)

_CHUNK_BLOCKS = 256


class ErofsReader:
    """An open layer; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(self._fd, SUPERBLOCK.size, SUPERBLOCK_OFFSET)
            if len(head) < SUPERBLOCK.size or struct.unpack_from("<I", head)[0] != MAGIC:
                raise self._damaged("it has no EROFS superblock")
            fields = SUPERBLOCK.unpack(head)
            self._root_nid, self._meta = fields[5], fields[10] * BLOCK
            if fields[9] * BLOCK > os.fstat(self._fd).st_size:
                raise self._damaged("it is cut off")
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> ErofsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def tree(self) -> Node:
        """Return the root of the whole tree; hard links share one node. Directories carry no data."""
        nodes: dict[int, Node] = {}
        root = self._node(self._root_nid, nodes)
        stack = [root]
        while stack:
            directory = stack.pop()
            for name, nid in self._entries(directory):
                known = nid in nodes
                child = self._node(nid, nodes)
                if known and child.is_dir:
                    raise self._damaged("a directory has two names")
                directory.children[name] = child
                if child.is_dir:
                    stack.append(child)
        return root

    def lookup(self, path: str) -> Node | None:
        """Return the node of an absolute path, links not followed, or None."""
        nodes: dict[int, Node] = {}
        node = self._node(self._root_nid, nodes)
        for part in (part.encode() for part in path.split("/") if part):
            if not node.is_dir:
                return None
            found = dict(self._entries(node)).get(part)
            if found is None:
                return None
            node = self._node(found, nodes)
        return node

    def names(self, path: str) -> list[str]:
        """Return the names in a directory (none when there is no such directory)."""
        node = self.lookup(path)
        if node is None or not node.is_dir:
            return []
        return sorted(os.fsdecode(name) for name, _ in self._entries(node))

    def data(self, node: Node) -> Iterator[bytes]:
        """Yield the content of a file or the target of a link."""
        whole = node.size_bytes - len(node.tail)
        offset = node.block * BLOCK
        end = offset + whole
        while offset < end:
            chunk = os.pread(self._fd, min(_CHUNK_BLOCKS * BLOCK, end - offset), offset)
            if not chunk:
                raise self._damaged("a file reaches past its end")
            offset += len(chunk)
            yield chunk
        if node.tail:
            yield node.tail

    def _node(self, nid: int, nodes: dict[int, Node]) -> Node:
        if nid in nodes:
            return nodes[nid]
        at = self._meta + nid * SLOT
        raw = os.pread(self._fd, 2 * BLOCK, at)
        if len(raw) < INODE.size:
            raise self._damaged("an inode lies outside of it")
        form, xattr_count, mode, _, size, block, _, uid, gid, mtime_s, mtime_ns, links = INODE.unpack_from(raw)
        layout = form >> 1
        if not form & 1 or layout not in (FLAT_PLAIN, FLAT_INLINE):
            raise self._damaged(f"inode format {form:#x} is none that Remora writes")
        node = Node(mode, uid=uid, gid=gid, mtime_s=mtime_s, mtime_ns=mtime_ns)
        node.size_bytes, node.block, node.layout, node.links, node.nid = size, block, layout, links, nid
        head = INODE.size
        if xattr_count:
            length = 12 + (xattr_count - 1) * 4
            node.xattrs = self._xattrs(os.pread(self._fd, length, at + head))
            head += length
        if layout == FLAT_INLINE:
            node.tail = os.pread(self._fd, size % BLOCK, at + head)
        nodes[nid] = node
        return node

    def _xattrs(self, raw: bytes) -> dict[bytes, bytes]:
        prefixes = {index: prefix for prefix, index in XATTR_PREFIXES}
        found: dict[bytes, bytes] = {}
        at = 12
        while at + 4 <= len(raw):
            name_length, index, value_length = struct.unpack_from("<BBH", raw, at)
            if index not in prefixes:
                raise self._damaged(f"extended attribute of class {index}")
            name = raw[at + 4 : at + 4 + name_length]
            found[prefixes[index] + name] = raw[at + 4 + name_length : at + 4 + name_length + value_length]
            at += 4 + name_length + value_length
            at += -at % 4
        return found

    def _entries(self, directory: Node) -> Iterator[tuple[bytes, int]]:
        content = b"".join(self.data(directory))
        for start in range(0, len(content), BLOCK):
            block = content[start : start + BLOCK]
            count = DIRENT.unpack_from(block)[1] // DIRENT.size
            heads = [DIRENT.unpack_from(block, number * DIRENT.size) for number in range(count)]
            for number, (nid, offset, kind) in enumerate(heads):
                end = heads[number + 1][1] if number + 1 < count else len(block)
                name = block[offset:end].rstrip(b"\0")
                if name not in (b".", b".."):
                    if not kind:
                        raise self._damaged("a directory entry has no type")
                    yield name, nid

    def _damaged(self, why: str) -> DataLossError:
        return DataLossError(f"the layer {self._path} is damaged: {why}", fix="remove the image and import it again")

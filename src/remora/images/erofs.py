"""Writes an uncompressed EROFS image in one pass over its files.

mkfs.erofs wants a tree on disk, so the owner, modes and attributes of a layer need root or a user namespace and every
file is written twice; Debian 12's (1.5) cannot read a tar. Here file data goes straight from the archive to its final
place, the metadata follows at the end, and equal input gives equal bytes on every machine. Uncompressed because the
page cache of the host is shared by all microVMs, while decompression would be paid in each of them, under emulation
dearly (docs/decisions/0005-own-erofs-writer.md has the figures).

On-disk format: Linux, fs/erofs/erofs_fs.h (extended inodes, flat and inline data, inline xattrs).

    block 0        superblock at byte 1024
    then           whole blocks of files, in the order they came
    then           whole blocks of directories
    meta_blkaddr   inodes, each followed by its xattrs and its tail of less than a block
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from remora.errors import InvalidArgumentError

BLOCK = 4096
MAGIC = 0xE0F5E1E2
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI")
SUPERBLOCK_OFFSET = 1024
INODE = struct.Struct("<HHHHQIIIIQII16x")
DIRENT = struct.Struct("<QHBx")
SLOT = 32
FLAT_PLAIN, FLAT_INLINE = 0, 2
#: kernel's erofs_xattr_prefixes; longest first so that a prefix of another never wins.
XATTR_PREFIXES = (
    (b"system.posix_acl_default", 3),
    (b"system.posix_acl_access", 2),
    (b"security.", 6),
    (b"trusted.", 4),
    (b"user.", 1),
)
#: A tail up to here sits behind its inode; a longer one gets a block of its own, which wastes less than half of it.
INLINE_MAX = BLOCK // 2
#: The root's number is 16 bits wide; 2 leaves number 0 unused, which user space takes for "no entry".
_ROOT_NID = 2
_HAS_CHECKSUM, _HAS_MTIME = 1, 2
_FILE_TYPE = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class Node:
    """An inode. Two names with the same `Node` are hard links. `mode` includes the file type, as in stat(2)."""

    __slots__ = (
        "block",
        "children",
        "gid",
        "layout",
        "links",
        "mode",
        "mtime_ns",
        "mtime_s",
        "nid",
        "size_bytes",
        "tail",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, *, uid: int = 0, gid: int = 0, mtime_s: int = 0, mtime_ns: int = 0) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_s = mtime_s
        self.mtime_ns = mtime_ns
        self.xattrs: dict[bytes, bytes] = {}
        self.children: dict[bytes, Node] = {}
        self.size_bytes = 0
        self.tail = b""
        self.block = 0
        self.layout = FLAT_PLAIN
        self.links = 0
        self.nid = -1

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class ErofsWriter:
    """Fills `file` (empty, seekable) with an image: `add_data` for each file and link, then `finish` with the root."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._blocks = 1
        file.write(bytes(BLOCK))

    def add_data(self, node: Node, chunks: Iterable[bytes]) -> None:
        """Store the content of a file or the target of a symbolic link; its xattrs must be set already."""
        node.block = self._blocks
        inline_room = INLINE_MAX if 64 + len(_xattr_bytes(node.xattrs)) <= BLOCK - INLINE_MAX else 0
        size = 0
        rest = b""
        for chunk in chunks:
            size += len(chunk)
            data = rest + chunk if rest else chunk
            whole = len(data) - len(data) % BLOCK
            self._write(memoryview(data)[:whole])
            rest = data[whole:]
        node.size_bytes = size
        if len(rest) > inline_room:
            self._write(rest + bytes(BLOCK - len(rest)))
            rest = b""
        node.tail = rest
        node.layout = FLAT_INLINE if rest else FLAT_PLAIN

    def finish(self, root: Node, uuid: bytes) -> int:
        """Write directories, inodes and the superblock; return the size of the image in bytes."""
        nodes = list(_walk(root))
        _count_links(nodes)
        dir_block = self._blocks
        for node in nodes:
            if node.is_dir:
                node.size_bytes = _directory_size(node)
                tail = node.size_bytes % BLOCK
                room = INLINE_MAX if 64 + len(_xattr_bytes(node.xattrs)) <= BLOCK - INLINE_MAX else 0
                inline = 0 < tail <= room
                node.layout = FLAT_INLINE if inline else FLAT_PLAIN
                node.block = dir_block
                dir_block += node.size_bytes // BLOCK + (0 if inline or not tail else 1)
        places = _place(nodes)
        parents = _parents(root)
        for node in nodes:
            if node.is_dir:
                content = _directory(node, parents[node.nid])
                whole = node.size_bytes - node.size_bytes % BLOCK if node.layout == FLAT_INLINE else len(content)
                node.tail = content[whole : node.size_bytes]
                self._write(memoryview(content)[:whole])
        meta_block = self._blocks
        self._write_inodes(nodes, places)
        self._file.seek(0)
        self._file.write(self._superblock(len(nodes), meta_block, uuid))
        self._file.flush()
        return self._blocks * BLOCK

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._blocks += len(data) // BLOCK

    def _write_inodes(self, nodes: list[Node], places: list[int]) -> None:
        buffer = bytearray()
        flushed = 0
        for number, (node, place) in enumerate(zip(nodes, places, strict=True), 1):
            buffer += bytes(place - flushed - len(buffer))
            xattrs = _xattr_bytes(node.xattrs)
            buffer += INODE.pack(
                1 | node.layout << 1,
                (len(xattrs) - 12) // 4 + 1 if xattrs else 0,
                node.mode,
                0,
                node.size_bytes,
                node.block,
                number,
                node.uid,
                node.gid,
                node.mtime_s,
                node.mtime_ns,
                node.links,
            )
            buffer += xattrs
            buffer += node.tail
            if len(buffer) >= 1 << 20:
                whole = len(buffer) - len(buffer) % BLOCK
                self._write(bytes(buffer[:whole]))
                del buffer[:whole]
                flushed += whole
        buffer += bytes(-len(buffer) % BLOCK)
        self._write(bytes(buffer))

    def _superblock(self, inodes: int, meta_block: int, uuid: bytes) -> bytes:
        if self._blocks >= 1 << 32:
            raise InvalidArgumentError("the layer is larger than an EROFS image can be (16 TiB)")

        def packed(checksum: int) -> bytes:
            fixed = SUPERBLOCK.pack(
                MAGIC, checksum, _HAS_CHECKSUM | _HAS_MTIME, 12, 0, _ROOT_NID, inodes, 0, 0,
                self._blocks, meta_block, 0, uuid, b"", 0,
            )  # fmt: skip
            return fixed.ljust(BLOCK - SUPERBLOCK_OFFSET, b"\0")

        return bytes(SUPERBLOCK_OFFSET) + packed(crc32c(packed(0)))


def _walk(root: Node) -> Iterator[Node]:
    """Every node once, a directory before its entries, names in byte order; numbers them provisionally."""
    count = 0
    stack = [root]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        node.nid = count
        count += 1
        yield node
        stack.extend(node.children[name] for name in sorted(node.children, reverse=True))


def _count_links(nodes: list[Node]) -> None:
    for node in nodes:
        node.links = 2 if node.is_dir else 0
    for node in nodes:
        for child in node.children.values():
            if child.is_dir:
                node.links += 1
            else:
                child.links += 1


def _parents(root: Node) -> dict[int, Node]:
    parents = {root.nid: root}
    stack = [root]
    while stack:
        node = stack.pop()
        for child in node.children.values():
            if child.is_dir:
                parents[child.nid] = node
                stack.append(child)
    return parents


def _place(nodes: list[Node]) -> list[int]:
    """Give each inode its byte offset in the metadata area: no inode and no tail may cross a block's end."""
    places = []
    at = _ROOT_NID * SLOT
    for node in nodes:
        tail = node.size_bytes % BLOCK if node.is_dir and node.layout == FLAT_INLINE else len(node.tail)
        if node.is_dir and node.layout == FLAT_PLAIN:
            tail = 0
        head = 64 + len(_xattr_bytes(node.xattrs))
        size = head + tail
        at += -at % SLOT
        must_fit = min(size, BLOCK) if size <= BLOCK else 64
        if at % BLOCK + must_fit > BLOCK:
            at += -at % BLOCK
        places.append(at)
        at += size
    for node, place in zip(nodes, places, strict=True):
        node.nid = place // SLOT
    return places


def _blocks_of_names(node: Node) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    used = 0
    for name in sorted([b".", b"..", *node.children]):
        cost = DIRENT.size + len(name)
        if used + cost > BLOCK:
            yield block
            block, used = [], 0
        block.append(name)
        used += cost
    yield block


def _directory_size(node: Node) -> int:
    blocks = list(_blocks_of_names(node))
    return (len(blocks) - 1) * BLOCK + sum(DIRENT.size + len(name) for name in blocks[-1])


def _directory(node: Node, parent: Node) -> bytes:
    out = bytearray()
    special = {b".": node, b"..": parent}
    for names in _blocks_of_names(node):
        out += bytes(-len(out) % BLOCK)
        offset = DIRENT.size * len(names)
        for name in names:
            child = special[name] if name in special else node.children[name]
            out += DIRENT.pack(child.nid, offset, _FILE_TYPE[stat.S_IFMT(child.mode)])
            offset += len(name)
        out += b"".join(names)
    if node.layout == FLAT_PLAIN:
        out += bytes(-len(out) % BLOCK)
    return bytes(out)


def _xattr_bytes(xattrs: dict[bytes, bytes]) -> bytes:
    if not xattrs:
        return b""
    out = bytearray(12)
    for name in sorted(xattrs):
        value = xattrs[name]
        known = next(((prefix, index) for prefix, index in XATTR_PREFIXES if name.startswith(prefix)), None)
        if known is None:
            raise InvalidArgumentError(f"an extended attribute that EROFS cannot hold: {name[:80]!r}")
        suffix, index = name[len(known[0]) :], known[1]
        if len(suffix) > 255 or len(value) > 0xFFFF:
            raise InvalidArgumentError(f"the extended attribute {name[:80]!r} is too large")
        out += struct.pack("<BBH", len(suffix), index, len(value)) + suffix + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) as the kernel computes it for the superblock: start at ~0, no final inversion."""
    table = _crc_table()
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value

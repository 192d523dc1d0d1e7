"""What Kata's shims and monitors say of their sandbox: where its hybrid socket is, or which vsock CID it has.

Every shim serves HTTP on a socket of its own; `GET /agent-url` is what `kata-runtime exec` asks, too. Source:
src/runtime/pkg/containerd-shim-v2/shim_management.go and src/libs/shim-interface of kata-containers 2 to 4.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path

from remora.agent.hybrid import open_directory
from remora.agent.peer_process import peer_uid

_TIMEOUT_S = 1.0
_MOST_BYTES = 64 << 10
_CID = re.compile(rb"guest-cid=(\d{1,10})(?:,|$)")


def agent_url(path: Path) -> str:
    """Return what the shim at a management socket says: `hvsock://PATH:1024` or `vsock://CID:1024`; empty for nothing.

    Raises:
        OSError: it does not answer.
        RemoraError: as `open_directory`.
    """
    with ExitStack() as stack:
        directory = open_directory(path.parent)
        stack.callback(os.close, directory)
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        sock.settimeout(_TIMEOUT_S)
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        if peer_uid(sock) not in (0, os.geteuid()):
            return ""
        sock.sendall(b"GET /agent-url HTTP/1.0\r\nHost: shim\r\n\r\n")
        answer = b""
        while len(answer) < _MOST_BYTES and (part := sock.recv(_MOST_BYTES)):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.decode("utf-8", "replace").strip() if b" 200 " in head.partition(b"\r\n")[0] else ""


def parse_agent_url(url: str) -> tuple[Path | None, int]:
    """Return the hybrid socket, or None, and the CID, or 0. Neither: a sandbox of another machine, or nonsense."""
    scheme, _, rest = url.partition("://")
    where, _, _port = rest.rpartition(":")
    if scheme == "hvsock" and where.startswith("/") and "\0" not in where:
        return Path(where), 0
    if scheme == "vsock" and where.isascii() and where.isdigit():
        return None, int(where)
    return None, 0


def cid_of_monitor(pid_file: Path, sandbox: str, proc: Path = Path("/proc")) -> int:
    """Return the CID on the command line of the QEMU that wrote a pid file; 0 if there is none, or it is another's."""
    try:
        pid = int(pid_file.read_text()[:20])
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return 0
    if not any(word.split(b",")[0] == b"sandbox-" + sandbox.encode() for word in words):
        return 0
    found = [match for word in words if word.startswith(b"vhost-vsock-") and (match := _CID.search(word))]
    return int(found[0][1]) if len(found) == 1 else 0

"""`kubectl port-forward` into a microVM.

containerd enters the pod's network namespace and dials `localhost:PORT`, where nothing listens: the server is in the
guest. A redirect of the namespace's loopback brings each such connection here, and a stream of the channel takes it to
the same port in the guest, whatever address the server there listens on. The redirect is in the pod's own namespace and
goes with it.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

from remora.errors import RemoraError
from remora.reactor import READ, Reactor
from remora.shim.streams import Pump
from remora.shim.tools import run
from remora.vmm import channel
from remora.wire.guest_pod_v1 import FORWARD_PORT

_SO_ORIGINAL_DST = 80
_RULES = """\
table ip remora_forward {{
 chain out {{
  type nat hook output priority -100; policy accept;
  ip daddr 127.0.0.1 tcp dport != {port} redirect to :{port}
 }}
}}
"""
_DIAL_TIMEOUT_S = 10.0


class PortForward:
    """Listens in the namespace of the thread that makes it. Reactor's thread only, after that."""

    def __init__(self, reactor: Reactor, directory: Path) -> None:
        """Raises FailedPreconditionError where nft is missing: everything else works without."""
        self._reactor = reactor
        self._directory = directory
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.bind(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        try:
            run(["nft", "-f", "-"], package="nftables", stdin=_RULES.format(port=port).encode())
        except RemoraError:
            self._listener.close()
            raise
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._pumps: set[Pump] = set()

    def start(self) -> None:
        self._reactor.register(self._listener.fileno(), READ, self._accept)

    def close(self) -> None:
        self._reactor.unregister(self._listener.fileno())
        self._listener.close()
        for pump in list(self._pumps):
            pump.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it has gone again, or we are out of descriptors
        wanted = struct.unpack_from("!H", sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16), 2)[0]
        # The guest's answer takes a moment, which the pod's other calls need not wait for.
        threading.Thread(target=self._dial, args=(sock, wanted), name="forward", daemon=True).start()

    def _dial(self, sock: socket.socket, port: int) -> None:
        try:
            stream = channel.connect(self._directory, FORWARD_PORT, _DIAL_TIMEOUT_S)
            stream.sendall(b"%d\n" % port)
        except (OSError, RemoraError):
            _reset(sock)
            return
        self._reactor.post(lambda: self._join(sock, stream))

    def _join(self, sock: socket.socket, stream: socket.socket) -> None:
        for one in (sock, stream):
            one.setblocking(False)
        halves = 2

        def half(ended: socket.socket) -> None:
            nonlocal halves
            halves -= 1
            try:
                ended.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other side has reset the connection
            if not halves:
                sock.close()
                stream.close()
                self._pumps.difference_update([up, down])

        up = Pump(self._reactor, os.dup(sock.fileno()), os.dup(stream.fileno()), lambda: half(stream))
        down = Pump(self._reactor, os.dup(stream.fileno()), os.dup(sock.fileno()), lambda: half(sock))
        self._pumps.update([up, down])


def _reset(sock: socket.socket) -> None:
    """Refuse, as a port on which nobody listens does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

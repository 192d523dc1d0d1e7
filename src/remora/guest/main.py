"""PID 1 of the microVM: brings up the control service, then serves until the host ends the VM.

Time to the control service is the guest's share of every cold start, so nothing is done before it that can be done
after, and nothing is imported that is not used.
"""

from __future__ import annotations

import os
import socket
import sys

from remora.guest import kernel, rootfs, system
from remora.guest.children import Children
from remora.guest.containers import Containers
from remora.guest.control import Control
from remora.guest.forwarder import Forwarder
from remora.guest.pod import Pod
from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.guest.ready import Ready
from remora.guest.running import Running
from remora.guest.single import Single
from remora.guest.stdio import Attaching, Stdio
from remora.reactor import Reactor
from remora.wire.guest_pod_v1 import FORWARD_PORT
from remora.wire.guest_v1 import CONTROL_PORT, STDIO_PORT
from remora.wire.ttrpc.reactor import ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping, Optional

    from remora.guest.streams import Carrier, Stream


class Guest:
    """All parts of PID 1, put together on one reactor. `port`: the channel's descriptor; None: the channel is vsock."""

    def __init__(self, reactor: Reactor, port: Optional[int], *, shared: str, template: bool) -> None:
        self._reactor = reactor
        children = Children(reactor)
        self.containers = Containers(reactor, children, self._started)
        single = Single(reactor, self.containers)
        pod = Pod(reactor, children, self.containers)
        self._attaching = Attaching(self._find_stdio)
        services = {CONTROL_PORT: self._serve, STDIO_PORT: self._attaching.accept, FORWARD_PORT: self._forward}
        self.channel: Carrier = self._open_channel(port, services)
        self.ready = Ready(reactor, f"{shared}/guest.sock", template=template)
        self.forwarder = Forwarder(reactor, shared, self.channel)
        drained = self.channel.when_drained
        self.control = Control(reactor, self.containers, single, pod, self.ready, self.forwarder, drained)

    def _open_channel(self, port: Optional[int], services: Mapping[int, Callable[[Stream], None]]) -> Carrier:
        # Each guest needs one of the two modules only.
        if port is None:
            from remora.guest.vsock import VsockChannel

            return VsockChannel(self._reactor, services, self._restarted)
        from remora.guest.channel import Channel

        return Channel(self._reactor, port, services, self._restarted)

    def _serve(self, stream: Stream) -> None:
        """ttrpc speaks to a socket: give it one, and carry its bytes."""
        ours, theirs = socket.socketpair()
        ServerConnection(self._reactor, theirs, self.control.handle)
        down = ToDescriptor(self._reactor, os.dup(ours.fileno()), lambda: finish())
        up = FromDescriptor(self._reactor, ours.detach(), lambda: finish())

        def finish() -> None:
            """Either side is done: so is the connection, and closing our end tells ttrpc."""
            down.close()
            up.close()
            stream.reset()

        down.attach(stream)
        up.attach(stream)
        stream.on_reset = finish

    def _find_stdio(self, name: str) -> Optional[Stdio]:
        for running in self.containers.running():
            if running.name == name and running.pid:
                return running.stdio
        return None

    def _forward(self, stream: Stream) -> None:
        from remora.guest.portforward import Forward  # few guests are asked for it

        Forward(self._reactor, stream)

    def _started(self, running: Running) -> None:
        self._attaching.started(running.name, running.stdio)

    def _restarted(self) -> None:
        """Another host talks to this guest: what Sync held back may go on."""
        self.control.hold(False)


def main() -> None:
    os.umask(0o022)
    reactor = Reactor()
    rootfs.prepare()
    flags = system.kernel_flags()
    port = None if kernel.VSOCK_ARGUMENT in flags else open_port()
    Guest(reactor, port, shared=rootfs.SHARED, template=kernel.TEMPLATE_ARGUMENT in flags)
    finish_boot()
    if "remora.trace=1" in flags:
        print(f"remora: control service up at {system.read_text('/proc/uptime').split()[0]} s", flush=True)
    try:
        reactor.run()
    finally:
        print("remora: PID 1 ends; the VM ends with it", file=sys.stderr, flush=True)


def open_port() -> int:
    """Return the descriptor of the virtio-serial port that carries the channel."""
    from remora.guest.channel import find_port

    return os.open(find_port(kernel.CHANNEL_PORT_NAME), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def finish_boot() -> None:
    """What the first container needs, but not the control service."""
    rootfs.set_hostname("")
    system.loopback_up()
    system.write_text("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids")

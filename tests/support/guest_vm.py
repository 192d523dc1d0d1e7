"""Boots the guest OS image with plain QEMU and speaks its channel, so that the guest is tested without the host's code.

The host's end runs on a reactor in a thread of its own; `connect` gives an ordinary socket for a stream.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import run_leftovers
from remora.errors import UnavailableError
from remora.guest.channel import Channel
from remora.guest.kernel import CHANNEL_PORT_NAME, OS_DISK_SERIAL, host_tsc_khz, kernel_arguments
from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.guest.streams import Stream
from remora.images.guest_os import GuestImage
from remora.reactor import Reactor
from remora.sandboxes.guest import connect_when_up
from remora.vmm.channel import connect, guest_socket
from remora.wire.guest_v1 import CONTROL_PORT, METHODS, SERVICE, STDIO_PORT
from remora.wire.ports import PORT
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client
from vhost_vsock import VhostVsock

#: A cold boot takes 2-3 s on an idle machine; the bound is for a busy one.
BOOT_TIMEOUT_S = 60.0


class HostEnd:
    """The host's end of a channel, for tests: streams as sockets."""

    def __init__(self, sock: socket.socket, on_accelerator: Callable[[socket.socket], None] | None = None) -> None:
        self._sock = sock
        self._reactor = Reactor()
        self._on_accelerator = on_accelerator
        self._pumps: list[FromDescriptor | ToDescriptor] = []
        self._writers: list[socket.socket] = []
        services = {PORT: self._accept} if on_accelerator is not None else {}
        self._channel = Channel(self._reactor, sock.fileno(), services, initiator=True)
        self._thread = threading.Thread(target=self._reactor.run, name="host end of the channel")
        self._thread.start()

    def connect(self, port: int) -> socket.socket:
        """Return a socket to `port` in the guest, once the guest has accepted it.

        Raises:
            ConnectionRefusedError: the guest rejected it.
        """
        ours, theirs = socket.socketpair()
        answer: queue.Queue[bool] = queue.Queue()

        def start() -> None:
            stream = self._channel.open(port)

            def accepted() -> None:
                self._carry(stream, theirs)
                answer.put(True)

            stream.on_accepted = accepted
            stream.on_reset = lambda: answer.put(False)

        self._reactor.post(start)
        if not answer.get(timeout=BOOT_TIMEOUT_S):
            ours.close()
            theirs.close()
            raise ConnectionRefusedError(f"the guest rejected a stream to port {port}")
        return ours

    def close(self) -> None:
        self._reactor.stop()
        self._thread.join()
        for pump in self._pumps:
            pump.close()
        for writer in self._writers:
            writer.close()
        self._reactor.close()
        self._sock.close()

    def _accept(self, stream: Stream) -> None:
        assert self._on_accelerator is not None
        ours, theirs = socket.socketpair()
        self._carry(stream, theirs)
        self._on_accelerator(ours)

    def _carry(self, stream: Stream, theirs: socket.socket) -> None:
        writer = theirs.dup()
        self._writers.append(writer)

        def down_done() -> None:
            try:
                writer.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the test has closed its end
            down.close()
            writer.close()

        def cut() -> None:
            up.close()
            down.close()
            writer.close()

        down = ToDescriptor(self._reactor, os.dup(theirs.fileno()), down_done)
        up = FromDescriptor(self._reactor, theirs.detach())
        self._pumps += [down, up]
        down.attach(stream)
        up.attach(stream)
        stream.on_reset = cut


class HybridHost:
    """The host's end where the guest has a vsock device: a back end that serves hybrid sockets in a folder."""

    def __init__(self, folder: Path, on_accelerator: Callable[[socket.socket], None] | None = None) -> None:
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread: threading.Thread | None = None
        if on_accelerator is not None:
            self._listener.bind(str(guest_socket(folder, PORT)))
            self._listener.listen()
            self._thread = threading.Thread(target=self._accept, args=(on_accelerator,))
            self._thread.start()
        self._backend = VhostVsock(folder / "vhost", folder)

    def connect(self, port: int) -> socket.socket:
        try:
            return connect(self._folder, port, BOOT_TIMEOUT_S)
        except UnavailableError as error:
            raise ConnectionRefusedError(f"the guest rejected a stream to port {port}") from error

    def wait_up(self) -> None:
        """Until PID 1 listens, the guest rejects every stream."""
        connect_when_up(self._folder, BOOT_TIMEOUT_S, gone=lambda: False).close()

    def close(self) -> None:
        if self._thread is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self._listener.close()
        self._backend.close()

    def _accept(self, on_accelerator: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                on_accelerator(self._listener.accept()[0])
            except OSError:
                return


class GuestVm:
    """One microVM under plain QEMU. `with GuestVm(image, layers=[path]) as vm:` boots it and leaves nothing behind.

    `vsock`: as Firecracker would run it, with a vsock device for the channel and disks without serials.
    """

    def __init__(
        self,
        image: GuestImage,
        layers: Sequence[Path] = (),
        *,
        memory_mib: int = 192,
        template: bool = False,
        vsock: bool = False,
        on_accelerator: Callable[[socket.socket], None] | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self._image = image
        self._vsock = vsock
        self._layers = layers
        self._memory_mib = memory_mib
        self.serials = [f"layer-{index}" for index in range(len(layers))]
        self._arguments = kernel_arguments(
            host_tsc_khz(Path("/proc/cpuinfo").read_text()),
            template=template,
            vsock=vsock,
            disks=[OS_DISK_SERIAL, *self.serials] if vsock else [],
            extra=extra,
        )
        self._on_accelerator = on_accelerator
        #: Lowest first. The guest's own OS lends its Python to the tests' containers.
        self.layers = [OS_DISK_SERIAL, *self.serials]

    def __enter__(self) -> GuestVm:
        self._folder = run_leftovers.directory("remora-guest-")
        self._console = self._folder / "console"
        path = self._folder / "channel"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(BOOT_TIMEOUT_S)
        self.started_s = time.monotonic()
        self.host: HostEnd | HybridHost
        if self._vsock:
            self.host = HybridHost(self._folder, self._on_accelerator)
            self.process = subprocess.Popen(self._argv(path), stdin=subprocess.DEVNULL)
        else:
            self.process = subprocess.Popen(self._argv(path), stdin=subprocess.DEVNULL)
            self.host = HostEnd(self._listener.accept()[0], self._on_accelerator)
        self._clients: list[Client] = []
        try:
            if isinstance(self.host, HybridHost):
                self.host.wait_up()
            self.client = self.new_client()
        except BaseException as error:
            error.add_note(f"the guest's console:\n{self.console}")
            self._stop()
            raise
        self.control_up_s = time.monotonic() - self.started_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def new_client(self) -> Client:
        client = Client(self.host.connect(CONTROL_PORT))
        self._clients.append(client)
        return client

    def call(self, method: str, request: Message | None = None, *, timeout_s: float = 60.0) -> Message:
        request_class, response_class = METHODS[method]
        return self.client.call(SERVICE, method, request or request_class(), response_class, timeout_s=timeout_s)

    def replace_host(self) -> None:
        """Be another host: the old one's connection, and all it had open, is gone."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.host.close()
        self.host = HostEnd(self._listener.accept()[0], self._on_accelerator)
        self.client = self.new_client()

    def attach(self, process: str, name: str) -> socket.socket:
        sock = self.host.connect(STDIO_PORT)
        sock.sendall(f"{process} {name}\n".encode())
        return sock

    def _argv(self, channel: Path) -> list[str]:
        image = self._image
        machine = "microvm,memory-backend=ram" if self._vsock else "microvm"
        argv = ["qemu-system-x86_64", "-M", machine, "-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max"]
        argv += ["-smp", "1", "-m", str(self._memory_mib), "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
        argv += ["-serial", f"file:{self._console}", "-kernel", str(image.kernel), "-initrd", str(image.initrd)]
        argv += ["-append", self._arguments]
        if self._vsock:
            argv += ["-object", f"memory-backend-memfd,id=ram,size={self._memory_mib}M,share=on"]
            argv += ["-chardev", f"socket,path={self._folder / 'vhost'},id=vsock"]
            argv += ["-device", "vhost-user-vsock-device,chardev=vsock"]
        else:
            argv += ["-device", "virtio-serial-device"]
            argv += ["-chardev", f"socket,path={channel},id=channel,reconnect=1"]
            argv += ["-device", f"virtserialport,chardev=channel,name={CHANNEL_PORT_NAME}"]
        disks = [(OS_DISK_SERIAL, image.disk), *zip(self.serials, self._layers, strict=True)]
        for serial, path in disks:
            argv += ["-drive", f"id={serial},file={path},format=raw,if=none,readonly=on"]
            argv += ["-device", f"virtio-blk-device,drive={serial}" + ("" if self._vsock else f",serial={serial}")]
        return argv

    def _stop(self) -> None:
        for client in self._clients:
            client.close()
        self.process.kill()
        self.process.wait()
        self.host.close()
        self._listener.close()
        shutil.rmtree(self._folder)


def read_until(sock: socket.socket, size: int) -> bytes:
    """Return at least `size` bytes; fewer only at the end."""
    got = b""
    while len(got) < size and (part := sock.recv(1 << 16)):
        got += part
    return got


def read_all(sock: socket.socket) -> bytes:
    got = b""
    while part := sock.recv(1 << 18):
        got += part
    return got

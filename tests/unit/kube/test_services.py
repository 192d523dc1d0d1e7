"""Calls to systemd, in D-Bus's wire format: read by a real dbus-daemon, and answered by a fake of systemd's socket."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_systemd import FakeSystemd, done, error, message
from remora.errors import UnavailableError
from remora.kube import services

BUS = {"path": "/org/freedesktop/DBus", "interface": "org.freedesktop.DBus"}


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[socket.socket]:
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed: apt-get install dbus-daemon")
    config = tmp_path / "bus.conf"
    config.write_text(
        f"<busconfig><type>session</type><listen>unix:path={tmp_path}/bus</listen><auth>EXTERNAL</auth>"
        '<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>'
        '<allow own="*"/></policy></busconfig>'
    )
    with subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"], stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "bus"))
            services._authenticate(sock)
            # The bus itself is asked: header fields name it, for which systemd's own socket has no need.
            yield sock
        daemon.terminate()


def test_a_real_bus_reads_our_calls(bus: socket.socket) -> None:
    def to_bus(data: bytes) -> bytes:
        """Add the header field DESTINATION, which only a bus needs."""
        order, kind, flags, version, body, serial, fields = struct.unpack("<cBBBIII", data[:16])
        held = services._field(data[16 : 16 + fields], 6, "s", services._string("org.freedesktop.DBus"))
        head = struct.pack("<cBBBIII", order, kind, flags, version, body, serial, len(held))
        return services._pad(head + held, 8) + data[len(data) - body :]

    bus.sendall(to_bus(services.encode("Hello", **BUS)))
    assert services._answer(bus) == ""
    bus.sendall(to_bus(services.encode("GetNameOwner", "org.freedesktop.DBus", **BUS)))
    assert services._answer(bus) == ""
    bus.sendall(to_bus(services.encode("GetNameOwner", "nobody.at.all", **BUS)))
    assert "nobody.at.all" in services._answer(bus)
    # A string, a list of strings and a flag are read as that: the bus says that the method wants other ones.
    bus.sendall(to_bus(services.encode("UpdateActivationEnvironment", ["a.service", "b"], False, "x", **BUS)))
    assert services._answer(bus)


def test_containerd_is_restarted_through_systemds_socket(tmp_path: Path) -> None:
    systemd = FakeSystemd(tmp_path, message(4) + done(b"/org/freedesktop/systemd1/job/1"))
    assert services.reachable(tmp_path)
    services.call(tmp_path, "RestartUnit", "containerd.service", "replace")
    systemd.close()
    assert b"RestartUnit" in systemd.calls
    assert b"containerd.service\0" in systemd.calls


def test_what_systemd_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    systemd = FakeSystemd(tmp_path, error(b"Unit containerd.service not found."))
    with pytest.raises(UnavailableError, match="not found"):
        services.call(tmp_path, "RestartUnit", "containerd.service", "replace")
    systemd.close()


def test_a_systemd_that_hangs_up_or_is_not_there_is_no_crash(tmp_path: Path) -> None:
    assert not services.reachable(tmp_path)
    systemd = FakeSystemd(tmp_path, b"l\x02")
    with pytest.raises(UnavailableError, match="hung up"):
        services.call(tmp_path, "Reload")
    systemd.close()
    with pytest.raises(UnavailableError):
        services.call(tmp_path, "Reload")

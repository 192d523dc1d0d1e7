"""The guest's pure parts: kernel arguments, users, the OCI bundle, crun's errors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from remora.errors import InternalError, InvalidArgumentError, NotFoundError, PermissionDeniedError
from remora.guest import bundle, container, kernel, rootfs, users
from remora.guest.children import exit_status
from remora.wire.guest_v1 import Process

SOURCES = Path(kernel.__file__).parent
PASSWD = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:100::/home/alice:/bin/sh\nbroken line\n"
GROUP = "root:x:0:\nusers:x:100:\nvideo:x:44:bob,alice\n"
ROOT = users.User(0, 0, [0], "/root")
ALICE = users.User(1000, 100, [100, 44], "/home/alice")


def test_an_emulated_cpu_gets_the_hosts_tsc_rate_and_a_real_one_does_not() -> None:
    emulated = kernel.kernel_arguments(2596128).split()
    assert {"tsc_early_khz=2596128", "tsc=reliable"} <= set(emulated)
    real = kernel.kernel_arguments(None)
    assert "tsc" not in real
    assert "mitigations=off" not in real


def test_the_end_of_pid_1_ends_the_vm() -> None:
    assert {"panic=-1", "reboot=t"} <= set(kernel.kernel_arguments(None).split())


def test_only_a_template_blocks_in_ready() -> None:
    assert kernel.TEMPLATE_ARGUMENT in kernel.kernel_arguments(None, template=True).split()
    assert kernel.TEMPLATE_ARGUMENT not in kernel.kernel_arguments(None).split()


def test_the_kernel_is_quiet_unless_its_console_is_asked_for() -> None:
    assert "quiet" in kernel.kernel_arguments(None).split()
    assert "quiet" not in kernel.kernel_arguments(None, console=True, extra=["debug"]).split()


def test_the_tsc_rate_is_read_from_cpuinfo() -> None:
    assert kernel.host_tsc_khz("processor\t: 0\ncpu MHz\t\t: 2596.128\n") == 2596128
    assert kernel.host_tsc_khz("processor\t: 0\n") is None


@pytest.mark.parametrize(
    ("text", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, [0], "/root"),
        ("alice", 1000, 100, [100, 44], "/home/alice"),
        ("1000", 1000, 100, [100, 44], "/home/alice"),
        ("alice:video", 1000, 44, [44], "/home/alice"),
        ("4242:7", 4242, 7, [7], "/"),
        ("4242", 4242, 0, [], "/"),
    ],
)
def test_a_user_is_found_by_name_or_number(text: str, uid: int, gid: int, groups: list[int], home: str) -> None:
    user = users.find(text, PASSWD, GROUP)
    assert (user.uid, user.gid, user.groups, user.home) == (uid, gid, groups, home)


def test_root_needs_no_passwd_file() -> None:
    user = users.find("", "", "")
    assert (user.uid, user.gid, user.home) == (0, 0, "/")


@pytest.mark.parametrize("text", ["bob", "-1", "99999999999", "alice:nobody"])
def test_an_unknown_user_or_group_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the image has no"):
        users.find(text, PASSWD, GROUP)


def test_the_bundle_is_the_json_that_was_meant() -> None:
    value = {"text": 'quote " \\ \n ü', "list": [1, True, False, "x"], "empty": {}, "none": []}
    assert json.loads(bundle.encode(value)) == value


def test_the_config_has_the_namespaces_and_the_limit() -> None:
    process = bundle.process_json(Process(args=["true"]), ROOT)
    config = json.loads(bundle.config_json(process, [bundle.bind("/a", "/b", readonly=True)], True, 1 << 26))
    assert {entry["type"] for entry in config["linux"]["namespaces"]} == {"pid", "ipc", "mount", "cgroup"}
    assert config["linux"]["resources"]["memory"]["limit"] == 1 << 26
    assert config["root"]["readonly"] is True
    assert config["mounts"][-1]["destination"] == "/b"
    assert "ro" in config["mounts"][-1]["options"]


def test_a_process_gets_defaults_but_keeps_what_it_was_given() -> None:
    given = Process(args=["x"], env=["PATH=/mine", "PYTHONPATH=/app", "EMPTY="], terminal=True, rows=3, columns=4)
    process = bundle.process_json(given, ALICE)
    env = dict(entry.split("=", 1) for entry in process["env"])
    assert env["PATH"] == "/mine"
    assert env["EMPTY"] == ""
    assert env["HOME"] == "/home/alice"
    assert env["PYTHONPATH"] == "/app:/run/remora/sdk"
    assert env["REMORA_ADDRESS"] == env["VACCEL_RPC_ADDRESS"] == "unix:///run/remora/accel.sock"
    assert process["consoleSize"] == {"height": 3, "width": 4}
    assert process["user"] == {"uid": 1000, "gid": 100, "additionalGids": [100, 44]}


def test_only_root_holds_capabilities_and_nobody_gains_privileges() -> None:
    root, alice = (bundle.process_json(Process(args=["x"]), user) for user in (ROOT, ALICE))
    assert root["capabilities"]["effective"]
    assert not alice["capabilities"]["effective"]
    assert "CAP_SYS_ADMIN" not in root["capabilities"]["bounding"]
    assert root["noNewPrivileges"]
    assert alice["noNewPrivileges"]


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("2026-01-01T00:00:00Z: executable file `foo` not found in $PATH: No such file or directory", NotFoundError),
        ("open executable: Permission denied", PermissionDeniedError),
        ("something else", InternalError),
        ("", InternalError),
    ],
)
def test_what_crun_says_becomes_an_error_that_names_the_command(log: str, kind: type[Exception]) -> None:
    error = container.start_error("foo", log, 1)
    assert type(error) is kind
    assert "'foo'" in error.message


def test_an_exit_status_is_a_shells() -> None:
    assert exit_status(7 << 8) == 7
    assert exit_status(9) == 137


def test_the_container_leaves_pid_1_its_memory() -> None:
    assert rootfs.container_limit(160 << 20) == 128 << 20
    assert rootfs.container_limit(40 << 20) == 20 << 20


def test_pid_1_imports_nothing_that_its_start_cannot_afford() -> None:
    # Each of these costs the emulated guest 10 to 100 ms (docs/guest.md).
    heavy = {"asyncio", "dataclasses", "enum", "inspect", "json", "logging", "re", "selectors", "subprocess", "typing"}
    code = "import sys; sys.path[:0] = sys.argv[1:]; import remora.guest.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(SOURCES / "lean"), str(SOURCES.parent.parent)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert not heavy & set(done.stdout.split())


def test_the_lean_socket_does_what_ttrpcs_server_and_pid_1_ask_of_it(tmp_path: Path) -> None:
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import os, signal, socket
assert type(socket.AF_UNIX) is int and type(signal.SIGTERM) is int
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
    listener.bind(sys.argv[2]); listener.listen(1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(sys.argv[2])
        server, _ = listener.accept()
        with server, server.dup() as twin:
            client.sendall(b"hello"); client.shutdown(socket.SHUT_WR)
            assert twin.recv(9) == b"hello" and server.recv(9) == b""
first, second = socket.socketpair()
socket.socket.sendmsg(first, [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\\0\\0\\0\\0")])
assert second.recvmsg(9, socket.CMSG_SPACE(4))[0] == b"x"
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code, str(SOURCES / "lean"), str(tmp_path / "s")], check=True)


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.name)
def test_the_guests_sources_are_python_3_9(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))

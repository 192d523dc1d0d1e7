"""The command line that confines a worker, and the system call filter, without starting a worker."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.workers import launcher, seccomp
from remora.workers.settings import WorkerSettings

RUNTIME = launcher.Runtime(
    python="/usr/bin/python3.11",
    stdlib=("/usr/lib/python3.11",),
    packages=("/src", "/venv/site-packages"),
    package_binds=("/src/remora", "/venv/site-packages"),
    libraries=("/usr/lib/x86_64-linux-gnu", "/lib64/ld-linux-x86-64.so.2"),
)


def binds(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def test_a_worker_sees_the_interpreter_its_packages_and_libraries_only() -> None:
    argv = launcher.worker_argv(WorkerSettings(device="cpu"), RUNTIME, ["3", "4"], 7)
    assert binds(argv, "--ro-bind") == [
        "/usr/bin/python3.11",
        "/usr/lib/python3.11",
        "/src/remora",
        "/venv/site-packages",
        "/usr/lib/x86_64-linux-gnu",
        "/lib64/ld-linux-x86-64.so.2",
    ]
    assert binds(argv, "--ro-bind-try") == ["/proc/cpuinfo", "/sys/devices/system/cpu"]
    assert not any(word in argv for word in ("--bind", "--dev", "--proc", "--tmpfs", "--share-net", "--dev-bind-try"))


def test_a_worker_has_no_network_no_capability_and_dies_with_the_agent() -> None:
    argv = launcher.worker_argv(WorkerSettings(device="cpu"), RUNTIME, [], 7)
    for option in ("--unshare-all", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv"):
        assert option in argv
    assert binds(argv, "--cap-drop") == ["ALL"]
    assert binds(argv, "--chdir") == ["/empty"]
    assert binds(argv, "--remount-ro") == ["/"]
    assert binds(argv, "--info-fd") == ["7"]


def test_where_a_container_runtime_keeps_sysctls_read_only_a_worker_starts_without_touching_them() -> None:
    found = dataclasses.replace(RUNTIME, closes_userns=False)
    assert "--disable-userns" not in launcher.worker_argv(WorkerSettings(device="cpu"), found, [], 7)


def test_telemetry_is_off_and_nothing_of_the_agents_environment_gets_in() -> None:
    argv = launcher.worker_argv(WorkerSettings(device="cpu"), RUNTIME, [], None)
    names = binds(argv, "--setenv")
    assert "ORT_DISABLE_TELEMETRY" in names
    assert set(names) == set(launcher.environment())


def test_without_confinement_it_is_the_bare_interpreter() -> None:
    argv = launcher.worker_argv(WorkerSettings(confinement="none"), RUNTIME, ["3"], None)
    assert argv[0] == RUNTIME.python
    assert argv[-1] == "3"


def test_what_this_interpreter_needs_is_found() -> None:
    found = launcher.runtime()
    assert Path(found.python).samefile(sys.executable)
    assert any(path.endswith("/remora") for path in found.package_binds)
    assert any("ld-linux" in path for path in found.libraries)
    assert all(os.path.exists(path) for path in found.libraries)


def test_a_missing_bubblewrap_is_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FailedPreconditionError, match="not installed") as caught:
        launcher.probe(WorkerSettings())
    assert "apt-get install bubblewrap" in (caught.value.fix or "")
    launcher.probe(WorkerSettings(confinement="none"))


def test_forbidden_user_namespaces_are_an_error_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(FailedPreconditionError, match="No permissions to create new namespace") as caught:
        launcher.probe(WorkerSettings())
    assert "confinement to 'none'" in (caught.value.fix or "")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a PID namespace: needs root")
def test_the_bubblewrap_of_an_agent_in_a_container_is_not_swept_away() -> None:
    worker = """exec -a bwrap python3 -c 'print("up", flush=True); input()' 'from remora.workers.'"""
    container = ["unshare", "--pid", "--fork", "--kill-child", "bash", "-c", f"({worker} <&3) 3<&0 & wait"]
    with subprocess.Popen(container, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert launcher.sweep() == 0
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize("wrong", [{"confinement": "hope"}, {"threads": 0}, {"standby": -1}, {"arena_bytes": 4096}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        WorkerSettings(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def judge(steps: bytes, arch: int, number: int, argument: int = 0) -> int:
    """Run a classic BPF program of the four instructions that ours has."""
    values, accumulator, at = {0: number, 4: arch, 16: argument}, 0, 0
    program = [struct.unpack_from("=HBBI", steps, offset) for offset in range(0, len(steps), 8)]
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code == 0x20:
            accumulator = values[value]
        elif code == 0x15:
            at += yes if accumulator == value else no
        elif code == 0x45:
            at += yes if accumulator & value else no
        else:
            assert code == 0x06
            return int(value)


@pytest.mark.parametrize("kind", seccomp.LISTS)
@pytest.mark.parametrize("machine", list(seccomp.MACHINES))
def test_the_filter_allows_the_list_threads_and_nothing_else(machine: str, kind: str) -> None:
    arch, _names, clone, clone3, _seccomp = seccomp.MACHINES[machine]
    allowed = seccomp.allowed(machine, kind)
    steps = seccomp.program(machine, kind)
    allow, eperm, enosys = 0x7FFF0000, 0x00050001, 0x00050026
    for number in range(600):
        expected = allow if number in allowed.values() else eperm
        if number in (clone, clone3):
            continue
        assert judge(steps, arch, number) == expected, number
    assert judge(steps, arch, clone3) == enosys
    assert judge(steps, arch, clone, 0x3D0F00) == allow  # what pthread_create asks for
    assert judge(steps, arch, clone, 17) == eperm  # fork
    assert judge(steps, arch, clone, 0x10000000 | 17) == eperm  # a new user namespace
    assert judge(steps, 0x40000003, 0) == 0x80000000  # another machine's calls
    assert judge(steps, arch, 0x40000000) == eperm  # x32


@pytest.mark.parametrize("machine", list(seccomp.MACHINES))
def test_a_loaded_library_may_call_less_and_never_change_its_filter(machine: str) -> None:
    models, loading, library = (set(seccomp.allowed(machine, kind)) for kind in seccomp.LISTS)
    assert loading - models == {"seccomp"}
    assert library < loading - {"seccomp"} < models
    assert not library & {"openat", "newfstatat", "readlinkat", "getdents64", "ioctl", "prlimit64"}
    assert library >= {"read", "sendto", "recvmsg", "mmap", "futex", "exit_group"}


def test_a_librarys_worker_gets_its_files_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "gpu_devices", lambda _settings: ["/dev/nvidia0"])
    argv = launcher.worker_argv(WorkerSettings(), RUNTIME, [], None, [8, 9])
    assert [argv[index + 1 : index + 3] for index, word in enumerate(argv) if word == "--ro-bind-data"] == [
        ["8", "/library/0"],
        ["9", "/library/1"],
    ]
    assert "--dev-bind-try" not in argv
    assert argv.index("--remount-ro") > argv.index("/library/1")


@pytest.mark.parametrize("machine", ["x86_64", "riscv64"])
def test_libraries_do_not_run_where_they_cannot_be_confined(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert launcher.why_no_libraries(WorkerSettings(confinement="none")) is not None
    assert (launcher.why_no_libraries(WorkerSettings()) is None) == (machine == "x86_64")


def test_forbidden_calls_fail_and_computing_goes_on() -> None:
    code = """
import ctypes, os, socket, threading
from remora.workers import seccomp
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
assert seccomp.install()
for attempt in (socket.socket, os.fork, lambda: os.execv("/bin/true", ["true"]), lambda: os.mkdir("/tmp/x")):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemExit(f"{attempt} was allowed")
thread = threading.Thread(target=lambda: bytearray(50_000_000))
thread.start(); thread.join()
print("computed")
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": os.defpath}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("computed", 0), done.stderr


def test_a_device_that_packages_need_is_for_models_only() -> None:
    with_torch = dataclasses.replace(RUNTIME, devices=("/dev/urandom",))
    settings = WorkerSettings(device="cpu")
    assert binds(launcher.worker_argv(settings, with_torch, [], 7), "--dev-bind-try") == ["/dev/urandom"]
    assert binds(launcher.worker_argv(settings, with_torch, [], 7, [9]), "--dev-bind-try") == []

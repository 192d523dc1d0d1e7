"""`containerd-shim-remora-v2`: what containerd runs for every pod, and for every container of it.

`start` is on the way of each pod and container, so it imports nothing but C modules, looks into config.json without
parsing it, and becomes the pod's server by a fork: the address goes out 7 ms of CPU after exec, and the pages are
shared. Whatever is slow happens in the server, whose socket listens already; early calls wait in its backlog.

containerd's protocol for shims: its core/runtime/v2/README.md. Everything but exactly `start` ends without a server.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SANDBOX_ID = b'"io.kubernetes.cri.sandbox-id"'
_CONTAINER_TYPE = b'"io.kubernetes.cri.container-type"'
#: A Unix socket's path holds 107 bytes, and a name of 64 hex digits goes behind this.
_MAX_DIRECTORY = 42
_STDIN_BYTES = 1 << 20


def main(argv: list[str] = sys.argv) -> int:
    """Do what containerd asks; returns the exit status."""
    try:
        flags, action = parse(argv[1:])
        if action == "start":
            # Not through the interpreter's own end, which takes as long as all of this.
            posix._exit(_start(flags))
        from remora.shim import command

        return command.run(flags, action)
    except Exception as error:  # noqa: BLE001 - the text reaches the pod's events
        message = f"containerd-shim-remora-v2: {getattr(error, 'message', None) or error}\n"
        fix = getattr(error, "fix", None)
        posix.write(2, (message + (f"fix: {fix}\n" if fix else "")).encode())
        return 1


def parse(arguments: list[str]) -> tuple[dict[str, str], str]:
    """Read `-x v`, `-x=v` and `--x v`; flags without a value are `true`, unknown ones harmless."""
    flags: dict[str, str] = {}
    action = ""
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            action = word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if equals or name in ("debug", "info", "v"):
            flags[name] = value or "true"
        elif waiting:
            flags[name] = waiting.pop(0)
    return flags, action


def annotation(config: bytes, key: bytes) -> str:
    """Return a string value of config.json by its quoted key, as containerd's encoder writes it; empty if absent."""
    at = config.find(key)
    if at < 0:
        return ""
    begin = config.find(b'"', at + len(key))
    end = config.find(b'"', begin + 1)
    return config[begin + 1 : end].decode()


def socket_path(address: str, namespace: str, group: str) -> str:
    """Return where a pod's server listens: the same for all of its containers, and for no other pod."""
    from remora.sha256 import hexdigest

    base = posix.environ.get(b"REMORA_RUNTIME_DIR", b"/run/remora").decode() + "/shim"
    if len(base) > _MAX_DIRECTORY:
        base = "/run/containerd/s"
    return f"{base}/{hexdigest(f'{address}/{namespace}/{group}'.encode())}"


def _read(path: str) -> bytes:
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return _read_all(fd)
    finally:
        posix.close(fd)


def _read_all(fd: int) -> bytes:
    whole = b""
    while len(whole) < _STDIN_BYTES and (part := posix.read(fd, 65536)):
        whole += part
    return whole


def _start(flags: dict[str, str]) -> int:
    import _socket

    config = _read("config.json")
    container = flags["id"]
    group = annotation(config, _SANDBOX_ID) or container
    path = socket_path(flags.get("address", ""), flags.get("namespace", ""), group)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    answer = f"unix://{path}"
    if annotation(config, _CONTAINER_TYPE) == "container":
        try:
            listener.connect(path)
        except OSError as error:
            raise OSError(
                f"the pod {group} has no shim any more ({error.strerror}): it cannot take a container"
            ) from error
        return _answer(answer)
    # containerd 2.3 says itself what it understands; all before it take the plain address (and 1.7 refuses version 3).
    if _is_bootstrap(_read_all(0), container):
        answer = f'{{"version":3,"address":"{answer}","protocol":"ttrpc"}}'
    _make_directory(path.rpartition("/")[0])
    if not _bind(listener, path):
        return _answer(answer)
    listener.listen(128)
    bundle = posix.getcwd()
    if posix.fork() == 0:
        _become_server(listener.detach(), path, bundle, flags)
    return _answer(answer)


def _is_bootstrap(given: bytes, container: str) -> bool:
    """True for BootstrapParams, whose first field is the id; the options of older versions begin with a type's URL."""
    name = container.encode()
    return given[:2] == bytes((0x0A, len(name) & 0x7F)) and given[2 : 2 + len(name)] == name


def _answer(answer: str) -> int:
    address = answer if answer.startswith("unix:") else answer.split('"')[5]
    # containerd 1.6 finds a shim again by this file, in the bundle of every container.
    fd = posix.open(".address", posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o600)
    posix.write(fd, address.encode())
    posix.close(fd)
    posix.rename(".address", "address")
    posix.write(1, answer.encode())
    return 0


def _make_directory(path: str) -> None:
    made = ""
    for part in path.strip("/").split("/"):
        made += "/" + part
        try:
            posix.mkdir(made, 0o700)
        except FileExistsError:
            pass


def _bind(listener: object, path: str) -> bool:
    """Bind the pod's socket; False if a server answers there already."""
    import _socket

    sock: _socket.socket = listener  # type: ignore[assignment]
    old = posix.umask(0o177)
    try:
        for _ in range(2):
            try:
                sock.bind(path)
                return True
            except OSError:
                probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
                try:
                    probe.connect(path)
                    return False
                except OSError:
                    posix.unlink(path)  # of a server that was killed
                finally:
                    probe.close()
        sock.bind(path)
        return True
    finally:
        posix.umask(old)


def _become_server(listener_fd: int, path: str, bundle: str, flags: dict[str, str]) -> NoReturn:
    status = 1
    try:
        posix.setsid()
        # containerd reads our output to its end, so none of it may stay open; what goes wrong belongs into its log.
        null = posix.open("/dev/null", posix.O_RDWR)
        try:
            log = posix.open(f"{bundle}/log", posix.O_RDWR | posix.O_NONBLOCK)
        except OSError:
            log = null
        for fd, source in ((0, null), (1, log), (2, log)):
            posix.dup2(source, fd)
        keep = posix.dup2(listener_fd, 3) if listener_fd != 3 else 3
        posix.closerange(4, 1 << 16)
        posix.chdir("/")
        from remora.shim import server

        server.serve(keep, path, bundle, flags)
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must never return into the parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        posix._exit(status)


if __name__ == "__main__":
    sys.exit(main())

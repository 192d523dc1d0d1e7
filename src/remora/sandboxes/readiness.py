"""Waits for a template's function to call `remora.ready()`, and says in its own words why it does not."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from remora.errors import DeadlineExceededError, FailedPreconditionError
from remora.sandboxes.guest import MAIN
from remora.sandboxes.processes import CHUNK_BYTES, GuestProcess
from remora.sandboxes.sandbox import Sandbox

#: How much of a function's output is kept to explain why it did not get ready.
TAIL_BYTES = 2000
_READY_FIX = "call remora.ready() once the function has loaded what it needs"


def until_ready(sandbox: Sandbox, timeout_s: float, on_output: Callable[[bytes], None] | None) -> None:
    """Wait for `remora.ready()`, or explain with the function's own words why it does not come."""
    tail = bytearray()

    def follow(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := sock.recv(CHUNK_BYTES):
                tail.extend(data)
                del tail[:-TAIL_BYTES]
                if on_output is not None:
                    on_output(data)

    readers = []
    # Not stdin: letting go of it would be the function's end of file, in every clone.
    function = GuestProcess(sandbox.guest, sandbox.directory, MAIN, stdin=False)
    for sock in (function.stdout, function.stderr):
        assert sock is not None
        readers.append(threading.Thread(target=follow, args=(sock,), daemon=True))
        readers[-1].start()
    try:
        sandbox.guest.wait_ready(timeout_s)
    except DeadlineExceededError as error:
        what = f"the function did not call remora.ready() within {timeout_s:g} s"
        raise FailedPreconditionError(_in_its_words(what, tail), fix=_READY_FIX) from error
    except FailedPreconditionError as error:
        # The function has ended: the rest of its output is on the way.
        for reader in readers:
            reader.join(1.0)
        raise FailedPreconditionError(_in_its_words(error.message, tail), fix=error.fix or _READY_FIX) from error
    finally:
        function.close()
        for reader in readers:
            reader.join(1.0)


def _in_its_words(what: str, tail: bytearray) -> str:
    said = bytes(tail).decode("utf-8", "replace").strip().splitlines()[-5:]
    return f"{what}; its last output: {' | '.join(said)}" if said else f"{what}; it wrote nothing"

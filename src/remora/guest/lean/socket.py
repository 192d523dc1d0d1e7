"""`socket` with what PID 1 and ttrpc's server use, without enumerations, selectors, files and name resolution."""

from __future__ import annotations

import _socket
from _socket import *  # noqa: F403 - this module stands in for the standard library's

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Tuple


class socket(_socket.socket):  # type: ignore[no-redef]  # in place of the C module's
    __slots__ = ("__weakref__",)

    def __enter__(self) -> socket:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def accept(self) -> Tuple[socket, Any]:
        fd, address = self._accept()  # type: ignore[attr-defined]  # what the standard library itself calls
        return socket(self.family, self.type, self.proto, fd), address

    def dup(self) -> socket:
        return socket(self.family, self.type, self.proto, _socket.dup(self.fileno()))


def socketpair() -> Tuple[socket, socket]:  # type: ignore[no-redef]  # likewise
    first, second = (
        socket(one.family, one.type, one.proto, one.detach())
        for one in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    )
    return first, second

"""`Resource`: files or buffers that operations use: models, data, libraries.

Nothing is sent before the first `register`. Local files go as bytes, so an agent never opens a path of its host for us;
web addresses are handed on as they are, and an agent that does not download for guests (Remora's) refuses them.
"""

from __future__ import annotations

import errno
import os
from itertools import count

from remora.vaccel import link
from remora.vaccel.errors import FFIError
from remora.vaccel.values import flat
from remora.wire import vaccel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Sequence, Tuple, Union

    from remora.vaccel.session import Session

    Path = Union[str, "os.PathLike[str]"]

_ids = count(1)


class Resource:
    """A resource of this process; the agent knows it once it is registered.

    Args:
        paths: A file, several files, a directory (its files), or web addresses.
        type_: A `ResourceType`.
    """

    def __init__(self, paths: Union[Path, Sequence[Path]], type_: int) -> None:
        listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self._set(type_)
        for path in [os.fspath(entry) for entry in listed]:
            if path.startswith(("http://", "https://")):
                self._urls.append(path)
            elif os.path.isdir(path):
                for name in sorted(os.listdir(path)):
                    if os.path.isfile(os.path.join(path, name)):
                        self._files.append((name, os.path.join(path, name)))
            elif os.path.isfile(path):
                self._files.append((os.path.basename(path), path))
            else:
                raise FFIError(errno.ENOENT, f"there is no file {path}")
        if not self._files and not self._urls:
            raise FFIError(errno.EINVAL, "a resource needs a file or a buffer")

    def _set(self, type_: int) -> None:
        self.id = next(_ids)
        #: The agent's number; 0 while no session has it registered.
        self.remote_id = 0
        self.type = int(type_)
        self._files: List[Tuple[str, str]] = []
        self._urls: List[str] = []
        self._buffer: Any = None
        self._sessions: set[int] = set()

    @classmethod
    def from_buffer(cls, data: Any, type_: int) -> Resource:
        """Make a resource of bytes in memory, sent from where they lie."""
        made = cls.__new__(cls)
        made._set(type_)
        if not len(flat(data)):
            raise FFIError(errno.EINVAL, "the buffer is empty")
        made._buffer = data
        return made

    @classmethod
    def from_numpy(cls, arr: Any) -> Resource:
        """Make a data resource of a numpy array."""
        return cls.from_buffer(arr, vaccel.ResourceType.DATA)

    def _blobs(self) -> List[vaccel.ResourceBlob]:
        if self._buffer is not None:
            data = flat(self._buffer)
            return [vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER, name="buffer", data=data, size=len(data))]
        blobs = []
        for name, path in self._files:
            with open(path, "rb") as file:
                content = file.read()
            blobs.append(vaccel.ResourceBlob(type_=vaccel.BlobType.MAPPED, name=name, data=content, size=len(content)))
        return blobs

    def register(self, session: Session) -> None:
        """Let a session use the resource; its bytes are sent with the first registration only.

        Raises:
            FFIError: the agent refused it.
        """
        request = vaccel.ResourceRegisterRequest(
            resource_type=self.type, resource_id=self.remote_id, session_id=session.remote_id
        )
        if not self.remote_id:
            request.paths, request.blobs = list(self._urls), self._blobs()
        answer = link.call("RegisterResource", request, vaccel.ResourceRegisterResponse)
        if answer.resource_id <= 0:
            raise FFIError(errno.EPROTO, f"the agent answered with the impossible id {answer.resource_id}")
        self.remote_id = answer.resource_id
        self._sessions.add(session.remote_id)

    def unregister(self, session: Session) -> None:
        """End a session's use. The agent destroys what no session uses; registering again sends the bytes again.

        Raises:
            FFIError: it is not registered with this session.
        """
        request = vaccel.ResourceUnregisterRequest(resource_id=self.remote_id, session_id=session.remote_id)
        link.call("UnregisterResource", request, vaccel.Empty)
        self.left(session)

    def left(self, session: Session) -> None:
        """Note that a session does not use it any more."""
        self._sessions.discard(session.remote_id)
        if not self._sessions:
            self.remote_id = 0

    def sync(self, session: Session) -> None:
        """Bring back what operations changed in a buffer.

        Raises:
            FFIError: the agent's bytes are not as many as the buffer's (EPROTO), or the buffer cannot be written to.
        """
        if session.remote_id not in self._sessions:
            raise FFIError(errno.EINVAL, "the resource is not registered with this session")
        request = vaccel.ResourceSyncRequest(resource_id=self.remote_id)
        blobs = link.call("SyncResource", request, vaccel.ResourceSyncResponse).blobs
        if self._buffer is None:
            return
        data = flat(self._buffer)
        if len(blobs) != 1 or len(blobs[0].data) != len(data):
            raise FFIError(errno.EPROTO, "the agent's copy has another size than the buffer")
        if data.readonly:
            if bytes(blobs[0].data) != bytes(data):
                raise FFIError(errno.EROFS, "the resource has changed, and its buffer cannot be written to")
        else:
            data[:] = blobs[0].data

    def registered(self, session: Session) -> bool:
        return session.remote_id in self._sessions

    def __repr__(self) -> str:
        return f"<Resource id={self.id} remote_id={self.remote_id} type={self.type}>"

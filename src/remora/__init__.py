"""What a function imports: `remora.connect()` and the names that come with it.

Nothing is loaded until it is used: `import remora` must not cost a function's cold start more than the standard
library's own `socket`, `struct` and `json` would, and PID 1 and the shim import this package without needing a client.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own costs 3 ms to import
if TYPE_CHECKING:
    from remora.client.aio import AsyncModel as AsyncModel
    from remora.client.aio import AsyncSession as AsyncSession
    from remora.client.aio import connect as connect_async
    from remora.client.ready import ready as ready
    from remora.client.session import Model as Model
    from remora.client.session import Session as Session
    from remora.client.session import connect as connect
    from remora.client.tensors import Tensor as Tensor
    from remora.client.values import Detection as Detection
    from remora.client.values import Keypoint as Keypoint
    from remora.client.values import Label as Label
    from remora.client.values import ModelInfo as ModelInfo
    from remora.client.values import Segmentation as Segmentation
    from remora.client.values import TensorSpec as TensorSpec
    from remora.errors import AbortedError as AbortedError
    from remora.errors import AlreadyExistsError as AlreadyExistsError
    from remora.errors import CancelledError as CancelledError
    from remora.errors import DataLossError as DataLossError
    from remora.errors import DeadlineExceededError as DeadlineExceededError
    from remora.errors import FailedPreconditionError as FailedPreconditionError
    from remora.errors import InternalError as InternalError
    from remora.errors import InvalidArgumentError as InvalidArgumentError
    from remora.errors import NotFoundError as NotFoundError
    from remora.errors import PermissionDeniedError as PermissionDeniedError
    from remora.errors import ProtocolError as ProtocolError
    from remora.errors import RemoraError as RemoraError
    from remora.errors import ResourceExhaustedError as ResourceExhaustedError
    from remora.errors import UnauthenticatedError as UnauthenticatedError
    from remora.errors import UnavailableError as UnavailableError
    from remora.errors import UnimplementedError as UnimplementedError

    aconnect = connect_async

__version__ = "0.1.0"

#: Public name -> (module, name there).
_HOMES = {
    "connect": ("remora.client.session", "connect"),
    "Session": ("remora.client.session", "Session"),
    "Model": ("remora.client.session", "Model"),
    "aconnect": ("remora.client.aio", "connect"),
    "AsyncSession": ("remora.client.aio", "AsyncSession"),
    "AsyncModel": ("remora.client.aio", "AsyncModel"),
    "ready": ("remora.client.ready", "ready"),
    "Tensor": ("remora.client.tensors", "Tensor"),
    "Detection": ("remora.client.values", "Detection"),
    "Keypoint": ("remora.client.values", "Keypoint"),
    "Segmentation": ("remora.client.values", "Segmentation"),
    "Label": ("remora.client.values", "Label"),
    "ModelInfo": ("remora.client.values", "ModelInfo"),
    "TensorSpec": ("remora.client.values", "TensorSpec"),
    "aio": ("remora.aio", ""),
}
_ERRORS = (
    "RemoraError",
    "AbortedError",
    "AlreadyExistsError",
    "CancelledError",
    "DataLossError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProtocolError",
    "ResourceExhaustedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
)

__all__ = ["__version__", *_HOMES, *_ERRORS]


def __getattr__(name: str) -> object:
    """Load a public name when it is first used (PEP 562)."""
    module, attribute = ("remora.errors", name) if name in _ERRORS else _HOMES.get(name, ("", ""))
    if not module:
        raise AttributeError(f"module 'remora' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(module)
    value = getattr(home, attribute) if attribute else home
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    return sorted(__all__)

"""vaccel-python's names on Remora's own client: change the import, keep the program.

    from remora.vaccel import Session

The binding of vAccel needs a C compiler and libvaccel, and converts lists element by element; this speaks vAccel's
protocol in the standard library, to any agent at `VACCEL_RPC_ADDRESS` (docs/vaccel.md). Nothing is loaded until it is
used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from remora.vaccel.arg import Arg as Arg
    from remora.vaccel.config import Config as Config
    from remora.vaccel.config import bootstrap as bootstrap
    from remora.vaccel.config import cleanup as cleanup
    from remora.vaccel.errors import FFIError as FFIError
    from remora.vaccel.errors import NullPointerError as NullPointerError
    from remora.vaccel.ops.tf import Node as Node
    from remora.vaccel.ops.torch import Tensor as Tensor
    from remora.vaccel.resource import Resource as Resource
    from remora.vaccel.session import Session as Session
    from remora.vaccel.types import ArgType as ArgType
    from remora.vaccel.types import OpType as OpType
    from remora.vaccel.types import PluginType as PluginType
    from remora.vaccel.types import ResourceType as ResourceType

_HOMES = {
    "Arg": "arg",
    "ArgType": "types",
    "Config": "config",
    "FFIError": "errors",
    "Node": "ops.tf",
    "NullPointerError": "errors",
    "OpType": "types",
    "PluginType": "types",
    "Resource": "resource",
    "ResourceType": "types",
    "Session": "session",
    "Tensor": "ops.torch",
    "bootstrap": "config",
    "cleanup": "config",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Load a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'remora.vaccel' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"remora.vaccel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

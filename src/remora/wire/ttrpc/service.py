"""What a service offers, for the servers that call a function per request (`server`, `aio`).

The reactor's server hands out raw calls instead: whoever answers from a state machine wants no function per request.
"""

from __future__ import annotations

from remora.errors import UnimplementedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Mapping, Optional, Type

    from remora.wire.protobuf import Message
    from remora.wire.ttrpc.calls import Call

    #: Service name -> method name -> method.
    Services = Mapping[str, Mapping[str, "Method"]]


class Method:
    """One method of a service.

    Args:
        function: Called with (request, context). With `client_streaming` the request is an iterator of messages, with
            `server_streaming` the result is one; asynchronous iterators and coroutines in `aio`.
    """

    __slots__ = ("request_cls", "response_cls", "function", "client_streaming", "server_streaming")

    def __init__(
        self,
        request_cls: Type[Message],
        response_cls: Type[Message],
        # The message classes of one method are its own affair; `request_cls` and `response_cls` check them.
        function: Callable[..., Any],
        *,
        client_streaming: bool = False,
        server_streaming: bool = False,
    ) -> None:
        self.request_cls = request_cls
        self.response_cls = response_cls
        self.function = function
        self.client_streaming = client_streaming
        self.server_streaming = server_streaming


class Context:
    """What a function may know of its call."""

    __slots__ = ("metadata", "deadline_s", "cancelled")

    def __init__(self, call: Call) -> None:
        self.metadata: Dict[str, List[str]] = call.metadata
        #: On the monotonic clock.
        self.deadline_s: Optional[float] = call.deadline_s
        #: The caller is gone, or its deadline has passed: the result goes nowhere.
        self.cancelled = False


def find(services: Services, service: str, method: str) -> Method:
    """Return a method.

    Raises:
        UnimplementedError: there is none; the message names it.
    """
    methods = services.get(service)
    if methods is None:
        raise UnimplementedError(f"service {service} is not offered here; {', '.join(sorted(services))} is")
    found = methods.get(method)
    if found is None:
        raise UnimplementedError(f"{service} has no method {method}; it has {', '.join(sorted(methods))}")
    return found

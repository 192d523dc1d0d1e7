"""The control door: `remora.control.v1.Control`, on a socket that only the agent's own user and root can open."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora import __version__
from remora.agent import grants, handover
from remora.agent.attachments import Attachments
from remora.agent.core import Core
from remora.agent.doors import views
from remora.agent.doors.health import Health
from remora.agent.draining import Draining
from remora.agent.identity import holder_of, of_sandbox
from remora.errors import RemoraError, UnimplementedError
from remora.wire import control_v1 as v1
from remora.wire import health_v1
from remora.wire.ttrpc.calls import Call

_EMPTY = v1.Empty()


class ControlDoor:
    """Answers the host: attach and detach sandboxes, say how things are."""

    def __init__(
        self,
        core: Core,
        attachments: Attachments,
        listeners: Callable[[], list[str]],
        metrics_address: str,
        draining: Draining,
        sockets: Callable[[], list[tuple[str, socket.socket]]],
        hand_over: Callable[[Callable[[int], None], float], None],
        state: Path,
    ) -> None:
        """
        Args:
            sockets: Returns what the agent listens on, by address.
            hand_over: Ends the agent, as `Draining.begin`, for a successor that has all sockets.
        """
        self._hand_over = hand_over
        self._sockets = sockets
        self._state = state
        self._draining = draining
        self._core = core
        self._attachments = attachments
        self._listeners = listeners
        self._metrics_address = metrics_address
        self._started_s = time.monotonic()
        self._health = Health(core, (v1.SERVICE,))
        methods: dict[str, Callable[[Call, Any], object]] = {
            "Attach": self._attach,
            "Grant": self._grant,
            "Detach": self._detach,
            "Attachments": self._list,
            "Status": lambda call, _request: call.respond(self._status()),
            "Drain": self._drain,
            "Handover": self._handover,
            "Policy": self._policy,
            "Sessions": lambda call, request: call.respond(views.sessions(core, request)),
            "Resources": lambda call, request: call.respond(views.resources(core, request)),
            "LoadedModels": lambda call, _request: call.respond(views.models(core)),
            "Usage": lambda call, _request: call.respond(views.usage(core, self._status())),
        }
        self._methods = {name: (v1.METHODS[name][0], method) for name, method in methods.items()}

    def handle(self, call: Call) -> None:
        """Answer a call, now or later. A RemoraError raised here is answered by the connection."""
        if call.service == health_v1.SERVICE:
            self._health.handle(call)
            return
        entry = self._methods.get(call.method) if call.service == v1.SERVICE else None
        if entry is None:
            raise UnimplementedError(
                f"the control socket has no {call.service[:100]}/{call.method[:100]}",
                fix=f"it has {v1.SERVICE} with {', '.join(v1.METHODS)}",
            )
        entry[1](call, entry[0].decode(call.payload))

    @staticmethod
    def _done(call: Call) -> Callable[[RemoraError | None], None]:
        def done(error: RemoraError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                call.respond(_EMPTY)

        return done

    def _attach(self, call: Call, request: v1.AttachRequest) -> None:
        self._attachments.attach(
            request.sandbox,
            request.tenant,
            dict(request.labels),
            request.directory,
            request.parent,
            request.template,
            self._done(call),
            cid=request.cid,
        )
        if request.grants:
            identity = of_sandbox(request.sandbox, request.tenant, request.labels, request.parent, request.template)
            self._core.present(identity, list(request.grants)[: grants.MAX_PRESENTED])
        self._core.log.info(
            "sandbox attached",
            sandbox=request.sandbox,
            tenant=request.tenant,
            directory=request.directory,
            parent=request.parent,
            template=request.template,
            cid=request.cid,
        )

    def _grant(self, call: Call, request: v1.GrantRequest) -> None:
        grant = grants.check(request.id, request.kind, request.shares, request.shares_per_device)
        self._core.grants.state(grant, self._done(call))
        self._core.log.info("shares granted", kind=grant.kind, shares=" ".join(sorted(grant.shares))[:200])

    def _detach(self, call: Call, request: v1.DetachRequest) -> None:
        self._attachments.detach(request.sandbox, request.keep_sessions, self._done(call))
        self._core.log.info("sandbox detached", sandbox=request.sandbox, keep_sessions=request.keep_sessions)

    def _list(self, call: Call, _request: v1.Empty) -> None:
        sessions = Counter(session.owner for session in self._core.sessions)
        connections = Counter(peer.identity.key for peer in self._core.peers)
        listed = []
        for attachment in self._attachments.all():
            identity = attachment.identity
            listed.append(
                v1.Attachment(
                    sandbox=identity.sandbox,
                    tenant=attachment.tenant or identity.sandbox,
                    labels=dict(identity.labels),
                    directory=str(attachment.directory or ""),
                    cid=attachment.cid,
                    parent=identity.parent,
                    template=identity.template,
                    connections=connections[identity.key],
                    sessions=sessions[identity.key],
                    requests=attachment.requests,
                    grants=[
                        v1.GrantedShares(
                            kind=granted.kind, shares=granted.shares, shares_per_device=granted.shares_per_device
                        )
                        for granted in self._core.grants.of(holder_of(identity.key, identity.labels)).values()
                    ],
                )
            )
        call.respond(v1.AttachmentsResponse(attachments=listed))

    def _drain(self, call: Call, request: v1.DrainRequest) -> None:
        def drained(given_up: int) -> None:
            call.respond(v1.DrainResponse(given_up=given_up, pid=os.getpid()))

        timeout_s = request.timeout_s or self._core.limits.request_timeout_s
        if request.successor:
            call.on_cancel(lambda _reason: self._draining.abandon())
            self._hand_over(drained, timeout_s)
        else:
            self._draining.begin(timeout_s, drained)

    def _handover(self, call: Call, request: v1.HandoverRequest) -> None:
        sockets = self._sockets()
        handover.send(request.socket, sockets[request.after : request.after + handover.BATCH])
        call.respond(v1.HandoverResponse(total=len(sockets), state=str(self._state)))

    def _policy(self, call: Call, _request: v1.Empty) -> None:
        file, text, refused = self._core.policy_source
        call.respond(v1.PolicyResponse(file=file, text=text, refused=refused))

    def _status(self) -> v1.StatusResponse:
        workers = [
            v1.WorkerStatus(
                id=worker.id,
                pid=worker.pid,
                domain=worker.domain,
                backend=worker.backend,
                models=list(worker.models),
                busy=worker.busy > 0,
                restarts=worker.restarts,
                device=worker.device,
                memory_bytes=worker.memory_bytes,
                jobs=worker.busy,
            )
            for worker in self._core.workers.workers()
        ]
        return v1.StatusResponse(
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_s,
            listeners=self._listeners(),
            sessions=len(self._core.sessions),
            connections=len(self._core.peers),
            workers=workers,
            store_bytes=max(0, self._core.store.bytes_stored),
            metrics_address=self._metrics_address,
        )

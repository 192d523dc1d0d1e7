"""`remora agent`: put an agent together, run it until a signal, take it apart."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from remora import __version__
from remora.agent import lifecycle
from remora.agent.addresses import Address
from remora.agent.cards import CatalogueEntry
from remora.agent.inherited import Inherited
from remora.agent.logs import Log
from remora.agent.policy import Policy
from remora.agent.trace_options import TraceOptions
from remora.reactor import Reactor
from remora.workers.contract import Workers
from remora.workers.settings import WorkerSettings

if TYPE_CHECKING:  # imported in `run`, while the first worker starts
    from remora.agent.certificates import CertificateFiles
    from remora.agent.core import Core
    from remora.agent.handover import Predecessor
    from remora.agent.server import Agent

#: Objects made and kept since the last garbage collection that bring the next one; Python's own number is 700.
_OBJECTS_PER_COLLECTION = 10_000


@dataclass(frozen=True)
class Options:
    """What the command line says, checked."""

    listen: Sequence[Address]
    state: Path
    policy: Policy
    control: Path
    metrics: Address
    json_log: bool = False
    ready_fd: int | None = None
    #: Read the configuration and the certificates again whenever their files change, without SIGHUP.
    watch: bool = False
    #: Where the policy was read, and is read again on SIGHUP.
    config: Path | None = None
    #: Where traces go; None: nowhere, and requests pay nothing for it.
    traces: TraceOptions | None = None
    #: Who may read the metrics over TLS: names of certificates.
    metrics_clients: Sequence[str] = ()
    #: For `tls://` addresses.
    certificates: CertificateFiles | None = None
    #: Succeed the agent that runs, if one does.
    takeover: bool = False
    #: Listening sockets from whoever started this process.
    inherited: Inherited = field(default_factory=Inherited)


#: Descriptors for everything but callers' connections: files, workers, listeners, control, metrics.
_RESERVED_DESCRIPTORS = 1024
#: Of a connection over TLS: its socket, and the pair between what en- and decrypts and its door (`wire.tls`).
_TLS_DESCRIPTORS = 3

MakeWorkers = Callable[[Reactor, WorkerSettings], Workers]
LoadCatalogue = Callable[[], Mapping[str, CatalogueEntry]]


def _within_descriptors(policy: Policy, addresses: Sequence[Address]) -> Policy:
    """Return the policy with no more connections than this process can have descriptors for, whatever door is taken."""
    each = _TLS_DESCRIPTORS if any(address.tls for address in addresses) else 1
    reserved = _RESERVED_DESCRIPTORS
    if policy.fleets.attach:
        from remora.agent.fleets.finder import DESCRIPTORS, MOST_SANDBOXES

        reserved += MOST_SANDBOXES * DESCRIPTORS
    wanted = policy.limits.connections * each + reserved
    allowed = lifecycle.raise_descriptor_limit(wanted)
    if allowed >= wanted:
        return policy
    connections = max(1, (allowed - min(reserved, allowed // 2)) // each)
    return replace(policy, limits=replace(policy.limits, connections=connections))


def _trace(core: Core, target: TraceOptions) -> Callable[[], None]:
    """Follow requests from now on; returns what ends it."""
    from remora.agent.otlp import Exporter
    from remora.agent.tracing import Buffer, Tracer

    place = urlsplit(target.endpoint)
    shown = f"{place.scheme}://{place.hostname}:{place.port or ''}{place.path}"  # without a password
    buffer = Buffer()
    change = "start the collector, or leave --trace-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT out"
    exporter = Exporter(
        buffer,
        target,
        lambda reason: core.log.info("traces not exported", endpoint=shown, reason=reason, change=change),
    )
    core.tracer = Tracer(buffer, target.ratio)
    core.trace_counts = lambda: (exporter.exported, exporter.lost, buffer.dropped)
    return exporter.close


def _end(agent: Agent, reactor: Reactor, timeout_s: float) -> None:
    """Drain on the first signal, stop at once on the next."""
    if agent.draining.begun:
        reactor.stop()
    else:
        agent.drain(timeout_s)


def _settle_memory() -> None:
    """Leave what is there for good out of every garbage collection, and collect less often.

    Looking at it again and again took a tenth of the agent's time under load. Requests leave no cycles behind: what
    the collector finds is little.
    """
    gc.freeze()
    gc.set_threshold(_OBJECTS_PER_COLLECTION, 20, 20)


def run(options: Options, load_catalogue: LoadCatalogue, make_workers: MakeWorkers) -> int:
    """Run an agent until SIGTERM or SIGINT; return the exit status.

    Raises:
        RemoraError: it cannot start; nothing is left behind.
    """
    lifecycle.check_ready_fd(options.ready_fd)
    lifecycle.private_directory(options.state, "state directory")
    lifecycle.private_directory(options.control.parent, "run-time directory")
    policy = _within_descriptors(options.policy, options.listen)
    with ExitStack() as stack:
        predecessor: Predecessor | None = None
        if options.takeover:
            from remora.agent.handover import Predecessor

            predecessor = Predecessor.find(options.control, options.state)
        inherited = options.inherited
        if predecessor is None:
            stack.enter_context(lifecycle.StateLock(options.state))
        else:
            stack.callback(predecessor.close)
            inherited = predecessor.sockets()
        stack.callback(inherited.close)
        log = Log(json_lines=options.json_log)
        stack.callback(log.close)
        reactor = Reactor()
        stack.callback(reactor.close)
        for signum in (signal.SIGTERM, signal.SIGINT):
            reactor.on_signal(signum, reactor.stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload into
        # Workers before sockets: whoever connects is served, and a node that cannot confine says so at once.
        workers = make_workers(reactor, policy.workers)
        stack.callback(workers.close)
        # While the first worker starts, which takes longer than all that follows.
        from remora.agent.reloading import Reloading, watch
        from remora.agent.server import Agent

        catalogue = load_catalogue()
        if predecessor is not None:
            given_up = predecessor.retire(policy.limits.drain_timeout_s)
            stack.enter_context(lifecycle.StateLock(options.state, wait_s=predecessor.ENDING_S))
            log.info("agent succeeds another", given_up=given_up)
        agent = Agent(
            reactor, options.state, policy, workers, catalogue, log, options.control.parent / "pods", inherited
        )
        stack.callback(agent.close)
        if options.traces is not None:
            stack.callback(_trace(agent.core, options.traces))
        if options.certificates is not None:
            agent.use_certificates(options.certificates)
        agent.listen_metrics(options.metrics, options.metrics_clients)
        agent.listen_control(options.control)
        addresses = [agent.listen(address) for address in options.listen]
        if policy.fleets.attach:
            agent.attach_fleets(policy.fleets)
        agent.recover()
        if inherited.kept:
            addresses += [agent.listen(address) for address in inherited.addresses()]
        inherited.close()
        log.info(
            "agent listening",
            version=__version__,
            pid=os.getpid(),
            listen=" ".join(addresses),
            control=str(options.control),
            metrics=agent.metrics_address,
            models=len(catalogue),
            connections=policy.limits.connections,
            sessions=len(agent.core.sessions),
            **{f"worker_{name}": text for name, text in workers.confinement.items()},
        )
        reloading = Reloading(agent.core, options.config, options.policy)

        def reload() -> None:
            reloading.reload()
            agent.reload_certificates()

        reactor.on_signal(signal.SIGHUP, reload)
        if options.watch:
            certificates = astuple(options.certificates) if options.certificates is not None else ()
            watch(reactor, [path for path in (options.config, *certificates) if path is not None], reload)
        for signum in (signal.SIGTERM, signal.SIGINT):
            reactor.on_signal(signum, lambda: _end(agent, reactor, policy.limits.drain_timeout_s))
        lifecycle.announce(options.ready_fd, " ".join(addresses))
        _settle_memory()
        reactor.run()
        log.info("agent stopping")
    return 0

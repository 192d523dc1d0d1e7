"""`remora agent`: run the node agent, or ask a running one how it is."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from remora import paths
from remora.wire.ports import PORT

if TYPE_CHECKING:
    from remora.agent.certificates import CertificateFiles
    from remora.agent.policy import Policy

NAME = "agent"
#: Where the kernel can give guests a vsock (QEMU's `vhost-vsock-pci`).
_VHOST_VSOCK = Path("/dev/vhost-vsock")
HELP = "run the node agent, or ask for its status"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("serve", "status", "drain"),
        default="serve",
        help="serve (the default), show status, or drain: refuse what is new, finish what runs, and exit",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help="unix:///path, unix://@name, vsock://:2048, tcp://127.0.0.1:port or tls://host:port; with oip+ before it "
        "(oip+unix:///path) for the Open Inference Protocol, REST and gRPC on the same address; oip+attached for that "
        "protocol on a socket of each attached sandbox; may be given several times "
        f"(default: unix://{paths.agent_socket()})",
    )
    parser.add_argument(
        "--attach",
        action="append",
        metavar="FLEET",
        help="find and serve microVMs that others run, as they come and go: kata or kata:/prefix for the sandboxes of "
        "an unmodified Kata, firecracker:/srv/fc/*/v.sock for directories with a vsock socket each; may be given "
        "several times (docs/kata.md)",
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help=f"what survives a restart (default: {paths.state_dir() / 'agent'})"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="limits, in TOML (docs/agent.md)")
    parser.add_argument(
        "--watch", action="store_true", help="read --config and certificates again when they change, as on SIGHUP"
    )
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help=f"the catalogue (default: {paths.state_dir() / 'models'})"
    )
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help=f"owner-only socket (default: {paths.control_socket()})"
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS",
        help="where /metrics and /healthz are served: unix:///path, tcp://127.0.0.1:port, 127.0.0.1:port, or "
        f"tls://host:port for --metrics-client (default: unix://{paths.runtime_dir() / 'metrics.sock'})",
    )
    parser.add_argument(
        "--metrics-client",
        action="append",
        default=[],
        metavar="NAME",
        help="common name or SPIFFE ID of a certificate whose holder may read the metrics over TLS; may be given "
        "several times",
    )
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="serve: succeed the agent that runs on the same control socket: take its sockets and sessions, without a "
        "refused connection",
    )
    parser.add_argument(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help="the agent's certificate with its chain, PEM, for tls:// addresses",
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="certificates of the authorities that issue callers' ones, PEM"
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="form of the lines on stderr")
    parser.add_argument(
        "--trace-endpoint",
        metavar="URL",
        help="an OTLP/HTTP collector for traces, such as http://127.0.0.1:4318 "
        "(default: OTEL_EXPORTER_OTLP_ENDPOINT, else no traces)",
    )
    parser.add_argument(
        "--trace-ratio",
        type=float,
        metavar="R",
        help="share of requests to trace whose caller does not say, 0 to 1 (default: OTEL_TRACES_SAMPLER_ARG, else 1)",
    )
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this descriptor when listening")
    parser.add_argument(
        "--timeout", type=float, default=0.0, metavar="S", help="drain: give up what still runs after this long"
    )
    parser.add_argument("--json", action="store_true", help="status: as JSON")
    parser.add_argument(
        "--ready", action="store_true", help="status: exit with 10 unless a new request would be served"
    )


def run(args: argparse.Namespace) -> int:
    control = (args.control or paths.control_socket()).absolute()
    if args.action == "drain":
        return _drain(control, args.timeout)
    return _status(control, as_json=args.json, ready=args.ready) if args.action == "status" else _serve(args, control)


def _serve(args: argparse.Namespace, control: Path) -> int:
    from remora.agent import main, policy
    from remora.agent.addresses import parse_address, parse_listen_address
    from remora.agent.inherited import from_systemd
    from remora.agent.trace_options import options as trace_options
    from remora.catalog import load_catalog
    from remora.workers.pool import WorkerPool

    metrics = args.metrics or f"unix://{paths.runtime_dir() / 'metrics.sock'}"
    if "://" not in metrics and not metrics.startswith("/"):
        metrics = f"tcp://{metrics}"
    inherited = from_systemd(os.environ)
    listen = args.listen or ([] if inherited.kept else [f"unix://{paths.agent_socket()}"])
    settings = _with_fleets(policy.load(args.config), args.attach)
    if any(text.partition(":")[0] == "kata" for text in settings.fleets.attach) and _VHOST_VSOCK.exists():
        # Kata's QEMU sandboxes come by the kernel's vsock.
        listen += [] if any(text.startswith("vsock://") for text in listen) else [f"vsock://:{PORT}"]
    options = main.Options(
        listen=[parse_listen_address(text) for text in listen],
        state=(args.state or paths.state_dir() / "agent").absolute(),
        policy=settings,
        control=control,
        metrics=parse_address(metrics),
        metrics_clients=args.metrics_client,
        json_log=args.log_format == "json",
        ready_fd=args.ready_fd,
        config=args.config.absolute() if args.config is not None else None,
        traces=trace_options(args.trace_endpoint, args.trace_ratio, os.environ),
        takeover=args.takeover,
        certificates=_certificates(args),
        inherited=inherited,
        watch=args.watch,
    )
    return main.run(options, lambda: load_catalog(args.models), WorkerPool)


def _with_fleets(policy: Policy, attach: list[str] | None) -> Policy:
    """Return the policy with the fleets of the command line, which replace the configuration file's."""
    from dataclasses import replace

    from remora.agent.fleets.layouts import parse_fleet

    fleets = policy.fleets if attach is None else replace(policy.fleets, attach=tuple(attach))
    for text in fleets.attach:
        parse_fleet(text)  # before anything is started
    return replace(policy, fleets=fleets)


def _certificates(args: argparse.Namespace) -> CertificateFiles | None:
    from remora.agent.certificates import CertificateFiles
    from remora.errors import InvalidArgumentError

    given = [args.tls_cert, args.tls_key, args.tls_ca]
    if not any(given):
        return None
    if not all(given):
        raise InvalidArgumentError("TLS takes three files", fix="give --tls-cert, --tls-key and --tls-ca")
    return CertificateFiles(*(path.absolute() for path in given))


def _drain(control: Path, timeout_s: float) -> int:
    from remora.agent.status import call
    from remora.errors import InvalidArgumentError
    from remora.wire import control_v1 as v1

    if not 0 <= timeout_s < 1e6:
        raise InvalidArgumentError(f"--timeout {timeout_s:g} is not a time", fix="give seconds")
    answer = call(control, "Drain", v1.DrainRequest(timeout_s=timeout_s), v1.DrainResponse, timeout_s=None)
    print(f"drained agent {answer.pid}: {answer.given_up} requests were given up")
    return 0


def _status(control: Path, *, as_json: bool, ready: bool) -> int:
    import json

    from remora.agent.status import as_dict, as_lines, ask, health
    from remora.errors import UnavailableError

    answer, state = ask(control), health(control)
    print(json.dumps(as_dict(answer, state), indent=2) if as_json else "\n".join(as_lines(answer, state)))
    return UnavailableError.exit_status if ready and state != "serving" else 0

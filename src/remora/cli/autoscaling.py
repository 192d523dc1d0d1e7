"""`remora autoscaling`: pods' figures for HorizontalPodAutoscalers, as an aggregated API server of the cluster."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remora.kube.aggregated import FrontProxy
    from remora.kube.fetching import KubernetesApi

NAME = "autoscaling"
HELP = "serve pods' figures to HorizontalPodAutoscalers (custom.metrics.k8s.io)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", default="tls://0.0.0.0:6443", metavar="ADDRESS", help="tls://host:port (default: %(default)s)"
    )
    parser.add_argument(
        "--tls-cert", type=Path, required=True, metavar="FILE", help="this server's certificate with its chain, PEM"
    )
    parser.add_argument("--tls-key", type=Path, required=True, metavar="FILE", help="its key, PEM")
    agents = parser.add_argument_group("where the agents' metrics are")
    agents.add_argument(
        "--agent",
        action="append",
        default=[],
        metavar="URL",
        help="https://host:port, http://127.0.0.1:port or unix:///path; may be given several times",
    )
    agents.add_argument(
        "--agents-of", metavar="NAMESPACE/SERVICE", help="all addresses behind a (headless) Service, by https"
    )
    agents.add_argument("--agent-ca", type=Path, metavar="FILE", help="who issues the agents' certificates, PEM")
    agents.add_argument(
        "--agent-cert", type=Path, metavar="FILE", help="certificate that the agents know as a --metrics-client, PEM"
    )
    agents.add_argument("--agent-key", type=Path, metavar="FILE", help="its key, PEM")
    agents.add_argument(
        "--agent-name",
        default="",
        metavar="NAME",
        help="name in the agents' certificates, where it is not their address",
    )
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="ask this often (default: 5)")
    parser.add_argument(
        "--window", type=float, default=30.0, metavar="S", help="figures are of this long (default: 30)"
    )
    api = parser.add_argument_group("kube-apiserver", "by default the one of the cluster that this pod runs in")
    api.add_argument("--api", default="", metavar="URL", help="where it is")
    api.add_argument("--api-token", type=Path, metavar="FILE", help="bearer token to show")
    api.add_argument("--api-ca", type=Path, metavar="FILE", help="who issues its certificate, PEM")
    api.add_argument(
        "--proxy-ca",
        type=Path,
        metavar="FILE",
        help="who issues the certificate by which it calls (default: as it says in kube-system's ConfigMap "
        "extension-apiserver-authentication)",
    )
    api.add_argument(
        "--proxy-name", action="append", default=[], metavar="NAME", help="common name in it (default: any)"
    )
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this descriptor when listening")


def run(args: argparse.Namespace) -> int:
    from remora.agent import lifecycle
    from remora.agent.addresses import parse_address
    from remora.errors import InvalidArgumentError
    from remora.kube.aggregated import AggregatedServer, Certificates
    from remora.kube.fetching import KubernetesApi, Trust, check_url
    from remora.kube.scraping import Scraper
    from remora.reactor import Reactor

    address = parse_address(args.listen)
    if not address.tls:
        raise InvalidArgumentError(f"{args.listen} is not safe to listen on", fix="write tls://host:port")
    if not 0.1 <= args.interval <= args.window <= 3600:
        raise InvalidArgumentError(
            f"--interval {args.interval:g} and --window {args.window:g} do not fit",
            fix="give 0.1 to 3600 seconds, the window no shorter than the interval",
        )
    if not args.agent and not args.agents_of:
        raise InvalidArgumentError(
            "nothing says where the agents are", fix="give --agent URL or --agents-of NS/SERVICE"
        )
    lifecycle.check_ready_fd(args.ready_fd)
    fixed = [check_url(url) for url in args.agent]
    api = KubernetesApi(args.api, args.api_token, args.api_ca)
    trust = Trust(args.agent_ca, args.agent_cert, args.agent_key, args.agent_name)
    if args.agents_of or any(url.startswith("https") for url in args.agent):
        trust.context()
    certificates = Certificates(args.tls_cert, args.tls_key, _front_proxy(args, api))
    certificates.read()
    scraper = Scraper(_agents(fixed, args.agents_of, api), trust, interval_s=args.interval, window_s=args.window)
    reactor = Reactor()
    for signum in (signal.SIGTERM, signal.SIGINT):
        reactor.on_signal(signum, reactor.stop)
    server = AggregatedServer(reactor, address, certificates, scraper, api.pods)
    scraper.start()
    try:
        lifecycle.announce(args.ready_fd, f"tls://{address.host}:{server.port}")
        reactor.run()
    finally:
        server.close()
        scraper.stop()
        reactor.close()
    return 0


def _front_proxy(args: argparse.Namespace, api: KubernetesApi) -> Callable[[], FrontProxy]:
    from remora.errors import FailedPreconditionError
    from remora.kube.aggregated import FrontProxy, published

    def given() -> FrontProxy:
        try:
            return FrontProxy(args.proxy_ca.read_text(), frozenset(args.proxy_name))
        except OSError as error:
            raise FailedPreconditionError(f"{args.proxy_ca} cannot be read: {error.strerror}") from error

    return given if args.proxy_ca is not None else lambda: published(api)


def _agents(fixed: list[str], service: str | None, api: KubernetesApi) -> Callable[[], Iterable[str]]:
    from remora.errors import InvalidArgumentError

    if not service:
        return lambda: fixed
    namespace, slash, name = service.partition("/")
    if not slash or not namespace or not name:
        raise InvalidArgumentError(f"--agents-of {service} is not namespace and Service", fix="write NAMESPACE/SERVICE")

    def found() -> list[str]:
        places = api.endpoints(namespace, name)
        return [*fixed, *(f"https://{f'[{host}]' if ':' in host else host}:{port}" for host, port in places)]

    return found

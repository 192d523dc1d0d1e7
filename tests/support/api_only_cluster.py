"""A real Kubernetes control plane without nodes: etcd, kube-apiserver with its aggregation layer, and the controllers.

Pods are made by the controllers and run nowhere; `run_pods` writes the status that a kubelet would. For what concerns
the API alone: `kubernetes_cluster` adds nodes that run pods.

Callers are told apart by static tokens, because it lives for one test run; what they may do is told by RBAC as
anywhere.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from authority import Authority
from kubernetes_client import KubernetesClient
from long_runners import LongRunners
from node_network import API_SERVICE, SERVICES

_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "{server}", certificate-authority: "{ca}"}}}}]
users: [{{name: "{user}", user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: "{user}"}}}}]
current-context: test
"""


class ApiOnlyCluster(KubernetesClient):
    """`with ApiOnlyCluster(binaries, directory) as plane:`; at its end no process of it is left."""

    def __init__(self, binaries: Mapping[str, Path], directory: Path, address: str = "127.0.0.1") -> None:
        self.binaries = binaries
        self.directory = directory
        self.address = address
        self.front_proxy = Authority(directory / "front-proxy", "front proxy")
        self._issuer = Authority(directory / "pki", "cluster")
        self._runners = LongRunners(directory / "logs")
        self._etcd, self._peer, self._port, self._controllers = _free_ports(4)
        self._tokens: list[str] = []
        self.url = f"https://{address}:{self._port}"
        self.token = self._issue_token("admin", "system:masters")
        super().__init__(binaries["kubectl"], str(self._write_kubeconfig("admin", self.token)))

    @property
    def authority(self) -> Path:
        """Certificate of whoever issued kube-apiserver's."""
        return self._issuer.certificate

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            print(self.tails())
            self.close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def run_pods(self, selector: str) -> list[str]:
        """Have all pods of a selector run, as a kubelet would say; return their names."""
        names = []
        for pod in self.get("pods", "-l", selector)["items"]:
            if "deletionTimestamp" in pod["metadata"]:
                continue
            name = pod["metadata"]["name"]
            names.append(name)
            if pod["status"].get("phase") != "Running":
                conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                status = {"phase": "Running", "startTime": now, "conditions": conditions}
                self.kubectl("patch", "pod", name, "--subresource=status", "-p", json.dumps({"status": status}))
        return sorted(names)

    def tails(self) -> str:
        """Return the last lines of every part's log."""
        return self._runners.tails()

    # -- the parts --------------------------------------------------------------------------------------------------

    def add_user(self, name: str, group: str = "") -> Path:
        """Make a user, before the start; return the kubeconfig that makes one him."""
        return self._write_kubeconfig(name, self._issue_token(name, group))

    def _issue_token(self, name: str, group: str) -> str:
        token = secrets.token_hex(16)
        self._tokens.append(f'{token},{name},{name},"{group}"\n')
        return token

    def _write_kubeconfig(self, name: str, token: str) -> Path:
        path = self.directory / f"{name.replace(':', '-')}.conf"
        path.write_text(_KUBECONFIG.format(server=self.url, ca=self.authority, user=name, token=token))
        return path

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End one part and start it again, as an upgrade or a crash would."""
        self._runners.restart(name, signum)

    def start(self) -> None:
        (self.directory / "tokens.csv").write_text("".join(self._tokens))
        key = self.directory / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd, self._peer))
        self.run(
            "etcd",
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )
        self.run("kube-apiserver", *self._apiserver_arguments(key, client))
        self.wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz") == "ok")
        self.run(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self.authority}",
            "--use-service-account-credentials=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._controllers}",
            f"--cert-dir={self.directory}/controllers",
            "--leader-elect=false",
            # A test scales up and down within a minute or two.
            "--horizontal-pod-autoscaler-sync-period=1s",
            "--horizontal-pod-autoscaler-downscale-stabilization=2s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=0s",
        )
        self.wait("the default service account", lambda: self.get("serviceaccount", "default"))

    def _apiserver_arguments(self, key: Path, etcd: str) -> list[str]:
        names = f"IP:{self.address},IP:{API_SERVICE},DNS:kubernetes.default.svc,DNS:kubernetes.default"
        certificate, private = self._issuer.issue("apiserver", alternative=names)
        proxy, proxy_key = self.front_proxy.issue("front-proxy-client")
        # Pods cannot reach a loopback address, so the service `kubernetes` gets none.
        loopback = ["--endpoint-reconciler-type=none"] if self.address == "127.0.0.1" else []
        return [
            f"--etcd-servers={etcd}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={self._port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={private}",
            f"--token-auth-file={self.directory}/tokens.csv",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICES}",
            "--authorization-mode=Node,RBAC",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
            # Other API servers behind this one.
            f"--requestheader-client-ca-file={self.front_proxy.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={proxy}",
            f"--proxy-client-key-file={proxy_key}",
            *loopback,
        ]

    def run(self, name: str, *arguments: str) -> None:
        """Start one of the programs beside the others."""
        self._runners.start(name, [str(self.binaries[name]), *arguments])

    def close(self) -> None:
        self._runners.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()

"""A small real Kubernetes: a control plane on this machine, and nodes in network namespaces of their own.

It all lies in temporary folders and listens on a bridge that is made for it. Callers are told apart by static tokens,
because the cluster lives for one test run; what pods are and kube-proxy may do is told by RBAC as anywhere.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from authority import Authority
from kubernetes_node import Node
from long_runners import LongRunners
from node_network import SERVICES, NodeNetwork

READY_S = 180.0
_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "{server}", certificate-authority: "{ca}"}}}}]
users: [{{name: {user}, user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {user}}}}}]
current-context: test
"""


class Cluster:
    """`with Cluster(binaries) as cluster:` runs one; at its end nothing of it is left."""

    def __init__(self, binaries: Mapping[str, Path], nodes: int = 2) -> None:
        self._binaries = binaries
        self._count = nodes
        self._network = NodeNetwork()
        self._tokens: list[str] = []
        self.base = Path(tempfile.mkdtemp(prefix="remora-kube-"))
        self._runners = LongRunners(self.base / "logs")
        self._etcd, self._peer, self._port, self._manager = _free_ports(4)
        self.server = f"https://{self._network.address}:{self._port}"
        self.nodes: list[Node] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    # -- asking -----------------------------------------------------------------------------------------------------

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.base / "admin.conf"

    def kubectl(self, *arguments: str, stdin: str = "", timeout_s: float = 180.0) -> str:
        done = subprocess.run(
            [str(self._binaries["kubectl"]), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [*objects]}))

    def wait(self, what: str, done: Any, timeout_s: float = READY_S) -> Any:
        """Ask `done` until it answers something true."""
        deadline_s = time.monotonic() + timeout_s
        problem = ""
        while True:
            try:
                if answer := done():
                    return answer
            except RuntimeError as error:
                problem = str(error)  # the API server is not there yet, or the object is not
            assert time.monotonic() < deadline_s, f"not in {timeout_s:g} s: {what} {problem}\n{self.tails()}"
            time.sleep(0.2)

    def ready_pods(self, selector: str, namespace: str = "default") -> list[dict[str, Any]]:
        items = self.get("pods", "-n", namespace, "-l", selector)["items"]
        return [pod for pod in items if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def leftovers(self) -> list[str]:
        """Return what pods have on any node."""
        return [f"{node.name}: {line}" for node in self.nodes for line in node.leftovers()]

    def tails(self) -> str:
        return "\n".join([self._runners.tails(), *(node.tails() for node in self.nodes)])

    # -- the parts --------------------------------------------------------------------------------------------------

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End one part of the control plane and start it again."""
        self._runners.restart(name, signum)

    def _start(self) -> None:
        self._network.start()
        self._authority = Authority(self.base / "pki")
        key = self.base / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        admin = self._user("admin", "system:masters")
        self.kubeconfig.write_text(admin)
        for name in ("kube-controller-manager", "kube-scheduler"):
            (self.base / f"{name}.conf").write_text(self._user(name, "system:masters"))
        proxy = self._user("system:kube-proxy", "")
        names = [f"remora-node-{index}" for index in range(self._count)]
        kubelets = {name: self._user(f"system:node:{name}", "system:nodes") for name in names}
        (self.base / "tokens.csv").write_text("".join(self._tokens))
        self._start_etcd()
        self._start_apiserver(key)
        self.wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz") == "ok")
        self._start_controller_manager(key)
        self._run("kube-scheduler", f"--kubeconfig={self.base}/kube-scheduler.conf", "--leader-elect=false")
        for index, name in enumerate(names):
            node = Node(index, self._binaries, self._network)
            self.nodes.append(node)
            node.start({"kubelet": kubelets[name], "kube-proxy": proxy})
        for name in names:
            self.wait(name, lambda name=name: is_ready(self.get("node", name)))
        self.wait("the default service account", lambda: self.get("serviceaccount", "default"))

    def _user(self, name: str, group: str) -> str:
        """Make a user; return the kubeconfig that makes one him."""
        token = secrets.token_hex(16)
        self._tokens.append(f'{token},{name},{name},"{group}"\n')
        ca = self._authority.certificate
        return _KUBECONFIG.format(server=self.server, ca=ca, user=name, token=token)

    def _run(self, name: str, *arguments: str) -> None:
        self._runners.start(name, [str(self._binaries[name]), *arguments])

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{self._peer}"
        self._run(
            "etcd",
            f"--data-dir={self.base}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )

    def _start_apiserver(self, key: Path) -> None:
        address = self._network.address
        first = SERVICES.replace("0.0/16", "0.1")
        names = f"IP:{address},IP:{first},DNS:kubernetes.default.svc,DNS:kubernetes.default"
        certificate, private = self._authority.issue("apiserver", alternative=names)
        front = Authority(self.base / "front-pki", "front proxy authority")
        proxy, proxy_key = front.issue("front-proxy-client")
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd}",
            f"--bind-address={address}",
            f"--advertise-address={address}",
            f"--secure-port={self._port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={private}",
            f"--token-auth-file={self.base}/tokens.csv",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICES}",
            "--authorization-mode=Node,RBAC",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
            # Other API servers behind this one: custom.metrics.k8s.io.
            f"--requestheader-client-ca-file={front.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={proxy}",
            f"--proxy-client-key-file={proxy_key}",
            "--enable-aggregator-routing=true",
        )

    def _start_controller_manager(self, key: Path) -> None:
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={self.base}/kube-controller-manager.conf",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self._authority.certificate}",
            "--use-service-account-credentials=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._manager}",
            f"--cert-dir={self.base}/controller",
            "--leader-elect=false",
            # A test scales up and down within minutes.
            "--horizontal-pod-autoscaler-sync-period=3s",
            "--horizontal-pod-autoscaler-downscale-stabilization=10s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=5s",
            "--node-monitor-grace-period=40s",
        )

    def close(self) -> None:
        if sys.exc_info()[0] is not None:
            print(self.tails(), file=sys.stderr)
        for node in reversed(self.nodes):
            node.close()
        self._runners.close()
        self._network.close()
        shutil.rmtree(self.base)


def is_ready(thing: Mapping[str, Any]) -> bool:
    conditions: Sequence[Mapping[str, str]] = thing.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()

"""A real Kubernetes control plane without nodes: etcd, kube-apiserver with its aggregation layer, and the controllers.

Pods are made by the controllers and run nowhere; `run_pods` writes the status that a kubelet would. For what concerns
the API alone: a cluster that runs pods is `kubernetes_cluster`.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from authority import Authority

_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://127.0.0.1:{port}", insecure-skip-tls-verify: true}}}}]
users: [{{name: admin, user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: admin}}}}]
current-context: test
"""
_READY_S = 90.0


class ApiOnlyCluster:
    """`with ApiOnlyCluster(binaries, directory) as plane:`; at its end no process of it is left."""

    def __init__(self, binaries: Mapping[str, Path], directory: Path) -> None:
        self._binaries = binaries
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.front_proxy = Authority(directory / "front-proxy", "front proxy")
        self._ports = [_free_port() for _ in range(4)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"https://127.0.0.1:{self._ports[2]}"

    @property
    def authority(self) -> Path:
        """Certificate of whoever issued kube-apiserver's."""
        return self.directory / "apiserver" / "apiserver.crt"

    def __enter__(self) -> ApiOnlyCluster:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end()

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            [str(self._binaries["kubectl"]), f"--kubeconfig={self.directory}/admin.conf", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [*objects]}))

    def wait(self, what: str, done: Callable[[], Any], timeout_s: float = _READY_S) -> Any:
        """Ask `done` until it answers something true."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if answer := done():
                    return answer
            except RuntimeError as error:
                said = str(error)
            else:
                said = ""
            assert time.monotonic() < deadline_s, f"not in {timeout_s:g} s: {what} {said}"
            time.sleep(0.2)

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

    def _start(self) -> None:
        key = self.directory / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (self.directory / "tokens.csv").write_text(f"{self.token},admin,admin,system:masters\n")
        config = self.directory / "admin.conf"
        config.write_text(_KUBECONFIG.format(port=self._ports[2], token=self.token))
        client, peer, port, controllers = self._ports
        self._spawn(
            "etcd",
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{client}",
            f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
        )
        certificate, proxy_key = self.front_proxy.issue("front-proxy-client")
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{client}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={self.directory}/apiserver",
            f"--token-auth-file={self.directory}/tokens.csv",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.216.0.0/16",
            "--authorization-mode=RBAC",
            "--endpoint-reconciler-type=none",
            f"--requestheader-client-ca-file={self.front_proxy.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={certificate}",
            f"--proxy-client-key-file={proxy_key}",
        )
        self.wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz") == "ok")
        self._spawn(
            "kube-controller-manager",
            f"--kubeconfig={config}",
            f"--service-account-private-key-file={key}",
            "--use-service-account-credentials=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={controllers}",
            f"--cert-dir={self.directory}/controllers",
            "--leader-elect=false",
            "--horizontal-pod-autoscaler-sync-period=1s",
            "--horizontal-pod-autoscaler-downscale-stabilization=2s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=0s",
        )
        self.wait("the default service account", lambda: self.get("serviceaccount", "default"))

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [str(self._binaries[name]), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                )
            )

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port

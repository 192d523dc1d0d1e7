"""A small real Kubernetes: one control plane and one kubelet on this machine, on a containerd that knows Remora.

Everything lies below one temporary folder and listens on loopback; callers are told apart by static tokens, because the
cluster lives for one test run and nobody else reaches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from containerd_process import Containerd

READY_S = 180.0
NODE = "remora-node"
SERVICES = "10.214.0.0/16"
_KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
address: {node}
port: {port}
healthzPort: 0
readOnlyPort: 0
containerRuntimeEndpoint: unix://{base}/c.sock
cgroupDriver: cgroupfs
cgroupRoot: {cgroup}
cgroupsPerQOS: true
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
podLogsDir: {base}/pod-logs
staticPodPath: ""
clusterDNS: ["10.214.0.10"]
clusterDomain: cluster.local
resolvConf: {base}/resolv.conf
evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
shutdownGracePeriod: 0s
"""
_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://127.0.0.1:{port}", insecure-skip-tls-verify: true}}}}]
users: [{{name: {user}, user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {user}}}}}]
current-context: test
"""


class Cluster:
    """`with Cluster(binaries, containerd) as cluster:` runs one; at its end no process of it is left."""

    def __init__(self, binaries: Mapping[str, Path], containerd: Containerd) -> None:
        self._binaries = binaries
        self.containerd = containerd
        self.base = containerd.base
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = _free_ports(5)
        self._tokens = {name: secrets.token_hex(16) for name in ("admin", "controller", "scheduler", "node")}
        self._cgroup = f"/remora-test-{os.getpid()}"
        #: The kubelet takes no loopback address for its node, so the node has an interface of its own.
        self._interface = f"rmk{os.getpid() % 100000}"
        self._node = f"10.215.{os.getpid() % 250}.1"

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

    def kubectl(self, *arguments: str, stdin: str = "", timeout_s: float = 120.0) -> str:
        done = subprocess.run(
            [str(self._binaries["kubectl"]), f"--kubeconfig={self.base}/admin.conf", *arguments],
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
        while True:
            try:
                if answer := done():
                    return answer
            except RuntimeError:
                pass  # the API server is not there yet, or the object is not
            assert time.monotonic() < deadline_s, f"not in {timeout_s:g} s: {what}\n{self.tails()}"
            time.sleep(0.2)

    def ready_pods(self, selector: str, namespace: str = "default") -> list[dict[str, Any]]:
        items = self.get("pods", "-n", namespace, "-l", selector)["items"]
        return [pod for pod in items if _is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]

    def tails(self) -> str:
        logs = sorted((self.base / "kube-logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + log.read_text(errors="replace")[-1500:] for log in logs)

    # -- the parts --------------------------------------------------------------------------------------------------

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End one part and start it again, as an upgrade or a crash would."""
        self._end(name, signum)
        getattr(self, f"_start_{name.replace('-', '_').removeprefix('kube_')}")()

    def _start(self) -> None:
        (self.base / "kube-logs").mkdir()
        (self.base / "pod-logs").mkdir()
        (self.base / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        key = self.base / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        groups = {"node": ("system:nodes", f"system:node:{NODE}"), "controller": ("system:masters", "controller")}
        rows = []
        for name, token in self._tokens.items():
            group, user = groups.get(name, ("system:masters", name))
            rows.append(f"{token},{user},{name},{group}")
            config = _KUBECONFIG.format(port=self._ports[2], user=name, token=token)
            (self.base / f"{name}.conf").write_text(config)
        (self.base / "tokens.csv").write_text("\n".join(rows) + "\n")
        subprocess.run(["ip", "link", "add", self._interface, "type", "bridge"], check=True)
        subprocess.run(["ip", "addr", "add", f"{self._node}/32", "dev", self._interface], check=True)
        subprocess.run(["ip", "link", "set", self._interface, "up"], check=True)
        self._start_etcd()
        self._start_apiserver()
        self.wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz") == "ok")
        self._start_controller_manager()
        self._start_scheduler()
        self._start_kubelet()
        self.wait("the node", lambda: _is_ready(self.get("node", NODE)))
        self.wait("the default service account", lambda: self.get("serviceaccount", "default"))

    def _start_etcd(self) -> None:
        client, peer = self._ports[:2]
        self._spawn(
            "etcd",
            f"--data-dir={self.base}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{client}",
            f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
        )

    def _start_apiserver(self) -> None:
        key = f"{self.base}/sa.key"
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._ports[0]}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._ports[2]}",
            f"--cert-dir={self.base}/apiserver",
            f"--token-auth-file={self.base}/tokens.csv",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICES}",
            "--authorization-mode=Node,RBAC",
            "--endpoint-reconciler-type=none",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
        )

    def _start_controller_manager(self) -> None:
        self._spawn(
            "kube-controller-manager",
            f"--kubeconfig={self.base}/controller.conf",
            f"--service-account-private-key-file={self.base}/sa.key",
            "--use-service-account-credentials=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports[4]}",
            f"--cert-dir={self.base}/controller",
            "--leader-elect=false",
            # A test scales up and down within a minute.
            "--horizontal-pod-autoscaler-sync-period=5s",
            "--horizontal-pod-autoscaler-downscale-stabilization=10s",
            "--node-monitor-grace-period=40s",
        )

    def _start_scheduler(self) -> None:
        self._spawn(
            "kube-scheduler", f"--kubeconfig={self.base}/scheduler.conf", "--leader-elect=false", "--secure-port=0"
        )

    def _start_kubelet(self) -> None:
        config = self.base / "kubelet.yaml"
        config.write_text(_KUBELET.format(base=self.base, node=self._node, port=self._ports[3], cgroup=self._cgroup))
        self._make_cgroups()
        self._spawn(
            "kubelet",
            f"--config={config}",
            f"--kubeconfig={self.base}/node.conf",
            f"--root-dir={self.base}/kubelet",
            f"--cert-dir={self.base}/kubelet-certs",
            f"--hostname-override={NODE}",
            f"--node-ip={self._node}",
        )

    def _make_cgroups(self) -> None:
        for mount in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = mount.partition(" - ")
            if kind.startswith(("cgroup ", "cgroup2 ")):
                root = Path(fields.split(" ")[4]) / self._cgroup.lstrip("/")
                with contextlib.suppress(OSError):
                    root.mkdir(exist_ok=True)
                if "cpuset" in kind:
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        with contextlib.suppress(OSError):
                            (root / name).write_text((root.parent / name).read_text())

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.base / "kube-logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(self._binaries[name]), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.base,
            )

    def _end(self, name: str, signum: int) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signum)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        if sys.exc_info()[0] is not None and (self.base / "kube-logs").is_dir():
            print(self.tails(), file=sys.stderr)
        for name in ("kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            self._end(name, signal.SIGTERM)
        subprocess.run(["ip", "link", "del", self._interface], capture_output=True, check=False)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split(" ")[1]
            if target.startswith(f"{self.base}/kubelet"):
                subprocess.run(["umount", "-l", target], capture_output=True, check=False)
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        for mount in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = mount.partition(" - ")
            if kind.startswith(("cgroup ", "cgroup2 ")):
                root = Path(fields.split(" ")[4]) / self._cgroup.lstrip("/")
                for directory, _, _ in os.walk(root, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)


def _is_ready(thing: Mapping[str, Any]) -> bool:
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

"""One node of a test cluster: kubelet and kube-proxy on a containerd that knows Remora, in a network namespace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from containerd_process import Containerd
from cri_client import CriError, Pod
from cri_v1 import Empty, SandboxList
from long_runners import LongRunners
from node_network import PODS, NodeNetwork, within
from remora.sandboxes.leftovers import find_leftovers

DNS = "10.214.0.10"
_KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
address: {address}
healthzPort: 0
readOnlyPort: 0
containerRuntimeEndpoint: unix://{base}/c.sock
cgroupDriver: cgroupfs
cgroupRoot: {cgroup}
cgroupsPerQOS: true
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
podLogsDir: {base}/pod-logs
staticPodPath: ""
clusterDNS: ["{dns}"]
clusterDomain: cluster.local
resolvConf: {base}/resolv.conf
evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
shutdownGracePeriod: 0s
"""
#: Connection tracking belongs to the host; a namespace may not change its size.
_PROXY = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: {pods}
hostnameOverride: {name}
clientConnection: {{kubeconfig: "{kubeconfig}"}}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
nftables: {{minSyncPeriod: 100ms, syncPeriod: 30s}}
"""


class Node:
    """`start` joins it to the cluster; `close` leaves nothing of it, whatever its pods did."""

    def __init__(self, index: int, binaries: Mapping[str, Path], network: NodeNetwork) -> None:
        self.name = f"remora-node-{index}"
        self.cgroup = f"/remora-test-{os.getpid()}-{index}"
        self._binaries = binaries
        subnet = f"{PODS.removesuffix('.0.0/16')}.{index + 1}"
        self.netns, self.address = network.add_node(f"{subnet}.0/24")
        self.containerd = Containerd(index, netns=self.netns, subnet=subnet, default_runtime="runc")
        self._runners = LongRunners(self.containerd.base / "kube-logs")

    def start(self, kubelet: Path, kube_proxy: Path) -> None:
        """Start everything, with these two kubeconfigs."""
        base = self.containerd.base
        self.containerd.start()
        self.containerd.import_images()
        (base / "pod-logs").mkdir()
        (base / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        config, proxy = base / "kubelet.yaml", base / "kube-proxy.yaml"
        config.write_text(_KUBELET.format(base=base, address=self.address, cgroup=self.cgroup, dns=DNS))
        proxy.write_text(_PROXY.format(pods=PODS, name=self.name, kubeconfig=kube_proxy))
        for root in self._cgroups():
            with contextlib.suppress(OSError):
                root.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                with contextlib.suppress(OSError):
                    (root / name).write_text((root.parent / name).read_text())
        self._start(
            "kubelet",
            f"--config={config}",
            f"--kubeconfig={kubelet}",
            f"--root-dir={base}/kubelet",
            f"--cert-dir={base}/kubelet-certs",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
        )
        self._start("kube-proxy", f"--config={proxy}")

    def _start(self, name: str, *arguments: str) -> None:
        self._runners.start(name, within(self.netns, [str(self._binaries[name]), *arguments]))

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End `kubelet` or `kube-proxy` and start it again."""
        self._runners.restart(name, signum)

    def tails(self) -> str:
        return f"=== {self.name}\n{self._runners.tails()}"

    def leftovers(self) -> list[str]:
        """Return a line for all that pods have on this node: processes, mounts, links, namespaces, cgroups, files."""
        base, runtime = str(self.containerd.base), str(self.containerd.runtime)
        found = []
        processes = [line for line in find_leftovers(self.containerd.base) if line.startswith("process ")]
        found += [line[:160] for line in processes if "containerd-shim" in line or "qemu-system" in line]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        places = (f"{base}/state/", f"{base}/kubelet/pods/", f"{runtime}/")
        found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(places)]
        links = subprocess.run(["ip", "-n", self.netns, "-br", "link"], capture_output=True, text=True, check=False)
        names = [line.split()[0] for line in links.stdout.splitlines()]
        kept = {"lo", "eth0", "ifb0", "ifb1", self.containerd.bridge}
        found += [f"link {name}" for name in names if name.partition("@")[0] not in kept]
        for root in self._cgroups():
            for folder, _, _ in os.walk(root):
                if "/pod" in folder:
                    found.append(f"cgroup {folder}")
        # Named by containerd's own log, as other nodes and tests have namespaces beside them.
        named = set(re.findall(r"/run/netns/(cni-[0-9a-f-]{36})", self.containerd.log))
        found += [f"network namespace {name}" for name in sorted(named) if (Path("/run/netns") / name).exists()]
        found += [f"lease {path}" for path in self.containerd.base.glob("ipam/*/10.*")]
        found += [f"pod directory {path}" for path in self.containerd.base.glob("kubelet/pods/*")]
        found += [
            f"file {path}" for place in ("s", "sandboxes") for path in (self.containerd.runtime / place).glob("*")
        ]
        sockets = (line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines())
        found += [f"socket {path}" for path in sockets if path.startswith((f"{runtime}/s/", f"{runtime}/sandboxes/"))]
        return found

    def _cgroups(self) -> list[Path]:
        """Return the kubelet's directory in every hierarchy of cgroups."""
        roots = []
        for mount in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = mount.partition(" - ")
            if kind.startswith(("cgroup ", "cgroup2 ")):
                roots.append(Path(fields.split(" ")[4]) / self.cgroup.lstrip("/"))
        return roots

    def microvms(self) -> list[int]:
        """Return the process ids of the microVMs that run here."""
        records = [json.loads(path.read_text()) for path in self.containerd.runtime.glob("s/*/state.json")]
        pids = [int(record.get("machine_pid") or 0) for record in records]
        return [pid for pid in pids if pid and Path(f"/proc/{pid}/exe").exists()]

    def _remove_pods(self) -> None:
        with contextlib.suppress(CriError, OSError):
            cri = self.containerd.cri
            for pod in cri.call("ListPodSandbox", Empty(), SandboxList).items:
                Pod(cri, pod.id).remove()

    def close(self) -> None:
        self._runners.close()
        self._remove_pods()
        self.containerd.close()
        for root in self._cgroups():
            for directory, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)

"""One node of a test cluster: kubelet and kube-proxy on a containerd that knows Remora, in a network namespace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from containerd_process import Containerd
from cri_client import CriError, Pod
from cri_v1 import Empty, SandboxList
from long_runners import LongRunners
from node_network import DNS_SERVICE, PODS, NodeNetwork, pod_subnet

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

    def __init__(self, index: int, binaries: Mapping[str, Path], network: NodeNetwork, *, remora: bool = True) -> None:
        self.name = f"remora-node-{index}"
        self.cgroup = f"/remora-test-{os.getpid()}-{index}"
        self._binaries = binaries
        subnet = pod_subnet(index)
        self.containerd = Containerd(index, node=True, subnet=subnet, remora=remora)
        assert self.containerd.node is not None
        self.spaces = self.containerd.node
        self.address = network.add_node(self.spaces, f"{subnet}.0/24")
        self._runners = LongRunners(self.containerd.base / "kube-logs")

    def start(self, kubelet: Path, kube_proxy: Path) -> None:
        """Start everything, with these two kubeconfigs."""
        base = self.containerd.base
        self.containerd.start()
        self.containerd.import_images()
        (base / "pod-logs").mkdir()
        (base / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        config, proxy = base / "kubelet.yaml", base / "kube-proxy.yaml"
        config.write_text(_KUBELET.format(base=base, address=self.address, cgroup=self.cgroup, dns=DNS_SERVICE))
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
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
        )
        self._start("kube-proxy", f"--config={proxy}")

    def _start(self, name: str, *arguments: str) -> None:
        self._runners.start(name, self.spaces.within([str(self._binaries[name]), *arguments]))

    def restart(self, name: str, signum: int = signal.SIGKILL) -> None:
        """End `kubelet` or `kube-proxy` and start it again."""
        self._runners.restart(name, signum)

    def tails(self) -> str:
        return f"=== {self.name}\n{self._runners.tails()}"

    def leftovers(self) -> list[str]:
        """Return a line for all that pods have on this node: processes, mounts, links, namespaces, cgroups, files."""
        processes = self.spaces.processes().values()
        found = [f"process {line[:160]}" for line in processes if "containerd-shim" in line or "qemu" in line]
        places = (f"{self.containerd.base}/state/", "/var/lib/kubelet/pods/", "/run/remora/", "/run/netns/")
        found += [f"mount {target}" for target in self.spaces.mounts() if target.startswith(places)]
        kept = {"lo", "eth0", "ifb0", "ifb1", self.containerd.bridge}
        names = [line.split()[0].partition("@")[0] for line in self.spaces.run("ip", "-br", "link").splitlines()]
        found += [f"link {name}" for name in names if name not in kept]
        for root in self._cgroups():
            found += [f"cgroup {folder}" for folder, _, _ in os.walk(root) if "/pod" in folder]
        found += [f"network namespace {path.name}" for path in self.spaces.path("/run/netns").glob("cni-*")]
        found += [f"lease {path}" for path in self.containerd.base.glob("ipam/*/10.*")]
        found += [f"pod directory {path.name}" for path in self.spaces.path("/var/lib/kubelet/pods").glob("*")]
        runtime = self.containerd.runtime
        found += [f"file {path}" for place in ("s", "sandboxes", "shim") for path in (runtime / place).glob("*")]
        sockets = Path(f"/proc/{self.spaces.pid}/net/unix").read_text().splitlines()
        found += [f"socket {line.split()[-1]}" for line in sockets if "/run/remora/s" in line]
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

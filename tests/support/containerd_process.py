"""A containerd of the tests' own: its root, its state, its sockets, its network, and nothing of it left afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import run_leftovers
from container_images import busybox_layer, file_layer, write_archive
from cri_client import Cri, CriError
from cri_v1 import Empty, SandboxList
from node_spaces import NodeSpaces
from remora.sandboxes.leftovers import find_leftovers
from remora.shim import launcher

_CONFIG = """\
version = 2
root = "{base}/root"
state = "{base}/state"
[grpc]
  address = "{base}/c.sock"
[ttrpc]
  address = "{base}/c.sock.ttrpc"
[debug]
  level = "debug"
[plugins."io.containerd.internal.v1.opt"]
  path = "{base}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/remora/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{base}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "{default_runtime}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.remora]
      runtime_type = "io.containerd.remora.v2"
      pod_annotations = ["io.remora.*"]
      container_annotations = ["io.remora.*", "grant.remora.dev/*"]
      privileged_without_host_devices = true
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.remora.options]
        TypeUrl = "remora/config"
        ConfigPath = "{base}/runtime.toml"
"""
#: The same for containerd 2.
_CONFIG_2 = """\
version = 3
root = "{base}/root"
state = "{base}/state"
[grpc]
  address = "{base}/c.sock"
[ttrpc]
  address = "{base}/c.sock.ttrpc"
[debug]
  level = "debug"
[plugins."io.containerd.internal.v1.opt"]
  path = "{base}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/remora/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{base}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "{default_runtime}"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.remora]
      runtime_type = "io.containerd.remora.v2"
      pod_annotations = ["io.remora.*"]
      container_annotations = ["io.remora.*", "grant.remora.dev/*"]
      privileged_without_host_devices = true
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.remora.options]
        TypeUrl = "remora/config"
        ConfigPath = "{base}/runtime.toml"
"""
_CNI = """\
{{"cniVersion": "1.0.0", "name": "{bridge}", "plugins": [
  {{"type": "bridge", "bridge": "{bridge}", "isGateway": true, "ipMasq": false,
    "ipam": {{"type": "host-local", "dataDir": "{base}/ipam", "ranges": [[{{"subnet": "{subnet}.0/24"}}]],
              "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}
"""
_RUNTIME = """\
[vm]
memory = "256M"
scratch = "2G"
boot_timeout = "60s"
"""
NAMESPACE = "k8s.io"
BUSYBOX = "localhost/remora/busybox:1"
READY_S = 30.0
#: Another containerd than Debian's 1.6, for the same tests: the path of its binary.
BINARY = os.environ.get("REMORA_TEST_CONTAINERD", "containerd")


def missing() -> list[str]:
    """Return what these tests need and the host lacks."""
    wanted = ("containerd", "ctr", "runc", "qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "ip", "tc", "nft")
    lacking = [name for name in wanted if shutil.which(name) is None]
    if not Path("/usr/lib/cni/bridge").exists():
        lacking.append("CNI plugins in /usr/lib/cni")
    if os.geteuid():
        lacking.append("root")
    return lacking


class Containerd:
    """`with Containerd() as containerd:` starts one and ends it with everything that it started."""

    def __init__(
        self,
        index: int = os.getpid() % 200,
        *,
        node: bool = False,
        subnet: str = "",
        remora: bool = True,
    ) -> None:
        self.bridge = f"rmt{index}x{os.getpid() % 100000}"
        self.base = run_leftovers.directory("remora-ctd-", *(() if node else (self.bridge,)))
        self.subnet = subnet or f"10.213.{index + 1}"
        self.runtime = self.base / "r"
        self._process: subprocess.Popen[bytes] | None = None
        self._cri: Cri | None = None
        for name in ("bin", "cni", "logs"):
            (self.base / name).mkdir()
        config = _CONFIG_2 if self.version.startswith("2.") else _CONFIG
        (self.base / "config.toml").write_text(
            config.format(base=self.base, default_runtime="runc" if node else "remora")
        )
        (self.base / "runtime.toml").write_text(_RUNTIME)
        cni = _CNI.format(base=self.base, bridge=self.bridge, subnet=self.subnet)
        (self.base / "cni" / "10-test.conflist").write_text(cni)
        if remora:
            launcher.write(self.base / "bin")
        self.node = self._make_node(remora) if node else None

    def _make_node(self, remora: bool) -> NodeSpaces:
        """Return a node with this containerd's configuration; without `remora`, one that knows only runc."""
        node = NodeSpaces(self.base, self.runtime, bare=not remora)
        config = self.base / "config.toml"
        if not remora:
            text = config.read_text()
            config.write_text(text[: text.rindex("    [plugins", 0, text.index("remora.v2"))])
        node.run("mkdir", "-p", "/etc/containerd")
        node.run("cp", str(config), "/etc/containerd/config.toml")
        return node

    def __enter__(self) -> Containerd:
        try:
            self.start()
            self.import_images()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> str:
        """Return the version of the containerd that is run: `1.6.20~ds1`, `2.1.4`."""
        done = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True)
        return done.stdout.split()[2].removeprefix("v")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def cri(self) -> Cri:
        if self._cri is None:
            self._cri = Cri(self.base / "c.sock", self.base / "logs")
        return self._cri

    @property
    def log(self) -> str:
        return (self.base / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start containerd, also again after `kill`."""
        environment = {
            **os.environ,
            "PATH": f"{self.base}/bin:{os.environ['PATH']}",
            "REMORA_RUNTIME_DIR": str(self.runtime),
        }
        command = [BINARY, "-c", str(self.base / "config.toml")]
        if self.node is not None:
            # A node of its own: everything is where a node has it.
            del environment["REMORA_RUNTIME_DIR"]
            command = self.node.within([BINARY, "-c", "/etc/containerd/config.toml"])
        with (self.base / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + READY_S
        while not self._answers():
            assert self._process.poll() is None, self.log[-2000:]
            assert time.monotonic() < deadline_s, self.log[-2000:]
            time.sleep(0.05)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.base / "c.sock"))
            except OSError:
                return False
        try:
            self.cri.call("ListPodSandbox", Empty(), Empty, READY_S)
        except CriError:
            return False  # it still looks for the pods of its last life
        return True

    def kill(self, signum: int = signal.SIGKILL, *, keep_client: bool = False) -> None:
        """End containerd alone; shims and microVMs go on. `keep_client`: a call of another thread is under way."""
        if self._cri is not None and not keep_client:
            self._cri.close()
            self._cri = None
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(30)
            self._process = None

    def sandboxes(self, name: str) -> list[str]:
        """Return the ids of the pods of that name."""
        answer = self.cri.call("ListPodSandbox", Empty(), SandboxList)
        return [one.id for one in answer.items if one.metadata is not None and one.metadata.name == name]

    def of_pods(self) -> list[str]:
        """Return what there is of pods: directories and sockets of shims."""
        return [str(path) for kind in ("s", "shim") for path in (self.runtime / kind).glob("*")]

    def argv(self, *arguments: str, namespace: str = NAMESPACE) -> list[str]:
        return ["ctr", "-a", str(self.base / "c.sock"), "-n", namespace, *arguments]

    def ctr(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 120.0) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.argv(*arguments), input=stdin, capture_output=True, timeout=timeout_s, check=False)

    def run(
        self, name: str, *command: str, options: tuple[str, ...] = (), stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a container of its own microVM to its end."""
        runtime = ("--runtime", "io.containerd.remora.v2")
        return self.ctr("run", "--rm", *runtime, *options, BUSYBOX, name, *command, stdin=stdin)

    def import_images(self) -> None:
        base = busybox_layer()
        self.add_image(BUSYBOX, [base, file_layer({"data/layer": b"second\n"})])
        self.add_image("localhost/remora/pause:1", [base], Cmd=["sleep", "1000000"])

    def add_image(self, name: str, layers: list[bytes], **config: object) -> None:
        archive = write_archive(self.base / "image.tar", name, layers, **config)
        self.import_archive(archive)
        archive.unlink()

    def import_archive(self, archive: Path) -> None:
        done = self.ctr("images", "import", str(archive), timeout_s=300)
        assert done.returncode == 0, done.stderr.decode()

    def close(self) -> None:
        """End everything and remove the files. Tests look for leftovers before; this only ends what they left."""
        self.kill(signal.SIGTERM)
        for line in find_leftovers(self.base):
            kind, _, rest = line.partition(" ")
            if kind == "process":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(rest.partition(":")[0]), signal.SIGKILL)
        if self.node is not None:
            self.node.close()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split(" ")[1]
            if target.startswith(str(self.base)):
                subprocess.run(["umount", "-l", target], capture_output=True, check=False)
        if sys.exc_info()[0] is not None:
            print(self.log[-4000:], file=sys.stderr)
        shutil.rmtree(self.base)

"""Builds the image of the agent, the device plugin and the node's installer, from packages, without a registry.

    make image                                   # build/remora-agent.tar
    ctr -n k8s.io images import build/remora-agent.tar

Four layers: Debian's packages, Python's (pinned by requirements/dev.txt), Remora, and the guest OS image. The same
packages and sources give the same bytes. `remora node install` copies what a node's shim runs with out of it
(kube/node_bundle.py).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from remora import __version__, paths
from remora.images.base import SOURCE_DATE_EPOCH, make_base_tar
from remora.images.model import ImageConfig, machine_architecture
from remora.images.oci_archive import write_oci_archive
from remora.images.requirements import install_requirements
from remora.images.tree_tar import LowerLayers, write_tree_tar
from remora.sandboxes.guest_files import renew_guest_files

ROOT = Path(__file__).resolve().parent.parent
NAME = "localhost/remora/agent"
SUITE, PYTHON = "bookworm", "3.11"
#: bubblewrap and util-linux (setpriv) are for workers, tini reaps what they leave; the rest is what a node's shim runs.
PACKAGES = (
    "bubblewrap",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "libpython3-stdlib",
    "nftables",
    "python3-minimal",
    "qemu-system-x86",
    "tini",
    "util-linux",
)
EXTRAS = ("node", "kube")
_SITE = f"/usr/local/lib/python{PYTHON}/dist-packages"
#: Isolated: in a microVM PYTHONPATH leads to the SDK, which would stand in the way of the whole package.
_REMORA = """\
#!/usr/bin/python3 -I
import sys
from remora.cli.main import main
sys.exit(main())
"""
#: Of the image, for the nodes: program -> where Debian has it.
_PROGRAMS = {
    "python3": f"/usr/bin/python{PYTHON}",
    "qemu-system-x86_64": "/usr/bin/qemu-system-x86_64",
    "mkfs.erofs": "/usr/bin/mkfs.erofs",
    "mkfs.ext4": "/sbin/mke2fs",
    "ip": "/bin/ip",
    "tc": "/sbin/tc",
    "nft": "/usr/sbin/nft",
}
_MACHINE = "x86_64-linux-gnu"
_TREES = (
    f"/usr/lib/python{PYTHON}",
    f"/lib/{_MACHINE}",
    f"/usr/lib/{_MACHINE}",
    "/usr/share/qemu",
    "/usr/share/seabios",
    f"{_SITE}/remora",
)


def requirements(extras: Iterable[str]) -> list[str]:
    """Return the lines of the lock that these extras of Remora need, with what those need in turn."""
    lock: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=\S)", (ROOT / "requirements/dev.txt").read_text()):
        if match := re.match(r"([A-Za-z0-9._-]+)", block):
            lock.setdefault(_normal(match[1]), []).append(block)
    wanted: set[str] = set()
    waiting = [("remora", frozenset(extras))]
    while waiting:
        name, with_extras = waiting.pop()
        for requirement in importlib.metadata.requires(name) or ():
            head, _, marker = requirement.partition(";")
            match = re.match(r"([A-Za-z0-9._-]+)", head)
            if match is None or ("extra" in marker and not any(f'"{one}"' in marker for one in with_extras)):
                continue
            found = _normal(match[1])
            if found not in wanted and found in lock and found != "remora":
                wanted.add(found)
                waiting.append((found, frozenset()))
    return [block for name in sorted(wanted) for block in lock[name]]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def build(output: Path, name: str) -> str:
    """Write the archive; return the digest of the image."""
    guest = renew_guest_files(paths.state_dir())
    with tempfile.TemporaryDirectory(prefix="remora-image-") as scratch_name:
        scratch = Path(scratch_name)
        layers = [scratch / f"{layer}.tar" for layer in ("debian", "python", "remora", "guest")]
        _say("Debian's packages")
        make_base_tar(scratch, layers[0], SUITE, "minimal", PACKAGES, lambda *_: None)
        _say("Python's packages")
        _python_layer(scratch, layers[1])
        _say("Remora")
        with LowerLayers(()) as lower:
            guest_digest = json.loads((guest.disk.parent / "manifest.json").read_text())["digest"]
            write_tree_tar(
                layers[3], {"/usr/share/remora/guest": guest.disk.parent}, lower, SOURCE_DATE_EPOCH, keep_caches=True
            )
            _remora_layer(scratch, layers[2], [layers[0], layers[3]], guest_digest, lower)
        config = ImageConfig(
            entrypoint=("tini", "--", "remora"),
            cmd=("--help",),
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            user="65532:65532",
            labels={"org.opencontainers.image.title": "remora", "org.opencontainers.image.version": __version__},
        )
        _say("the archive")
        output.parent.mkdir(parents=True, exist_ok=True)
        return write_oci_archive(output, name, layers, config, machine_architecture())


def _python_layer(scratch: Path, tar: Path) -> None:
    lines = scratch / "requirements.txt"
    lines.write_text("\n".join(requirements(EXTRAS)) + "\n")
    install_requirements(lines, PYTHON, scratch / "site")
    for unused in ("tests", "test"):
        for path in [path for path in (scratch / "site").glob(f"*/{unused}") if path.is_dir()]:
            shutil.rmtree(path)
    with LowerLayers(()) as lower:
        write_tree_tar(tar, {_SITE: scratch / "site"}, lower, SOURCE_DATE_EPOCH, keep_caches=True)


def _remora_layer(scratch: Path, tar: Path, others: list[Path], guest_digest: str, lower: LowerLayers) -> None:
    program = scratch / "remora"
    program.write_text(_REMORA)
    program.chmod(0o755)
    files = {f"{_SITE}/remora": ROOT / "src/remora", "/usr/local/bin/remora": program}
    write_tree_tar(tar, files, lower, SOURCE_DATE_EPOCH)
    # What a node gets is named by what it is made from.
    state = hashlib.sha256(json.dumps([_TREES, _PROGRAMS]).encode())
    for layer in (*others, tar):
        with layer.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    bundle = {
        "id": f"{__version__}-{state.hexdigest()[:12]}",
        "trees": _TREES,
        "programs": _PROGRAMS,
        "linker": f"/lib/{_MACHINE}/ld-linux-x86-64.so.2",
        "libraries": [f"/lib/{_MACHINE}", f"/usr/lib/{_MACHINE}"],
        "source": _SITE,
        "guest": "/usr/share/remora/guest",
        "guest_digest": guest_digest,
    }
    (scratch / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n")
    write_tree_tar(tar, {**files, "/usr/share/remora/bundle.json": scratch / "bundle.json"}, lower, SOURCE_DATE_EPOCH)


def _say(what: str) -> None:
    print(f"agent image: {what} ...", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="build the agent's container image")
    parser.add_argument("--output", type=Path, default=ROOT / "build/remora-agent.tar", metavar="FILE")
    parser.add_argument("--name", default=f"{NAME}:{__version__}", metavar="NAME", help="what to call it")
    args = parser.parse_args()
    digest = build(args.output, args.name)
    print(f"{args.name}  {digest}  {args.output}  {args.output.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

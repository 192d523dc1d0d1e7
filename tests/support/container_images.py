"""Container images for containerd's tests, as OCI archives that `ctr images import` takes: busybox, with or without
layers of the caller's own."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from remora import paths

_NAMES = (
    "sh cat dd echo sleep id stty env pwd hostname head tail ls true false wc kill touch date grep mknod rm mkdir cut "
    "nc wget httpd nslookup ip ping ps mount df free seq tr od stat readlink test sync chown chmod ln mv cp find"
)
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n"
_GROUP = "root:x:0:\nalice:x:1000:\nvideo:x:44:alice\n"


def busybox() -> bytes:
    """Return the static busybox of the guest OS's own packages."""
    packages = paths.state_dir() / "guest" / "packages"
    newest = max(packages.glob("busybox-static_*.deb"), key=lambda path: path.stat().st_mtime)
    return _from_deb(newest, "busybox")


def busybox_layer() -> bytes:
    """Return a tar of a root that holds busybox under its usual names, and the users root and alice."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("bin", "etc", "tmp", "home", "home/alice", "root", "proc", "sys", "dev", "run", "data"):
            _add(tar, name, kind=tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        _add(tar, "bin/busybox", busybox(), mode=0o755)
        for name in _NAMES.split():
            _add(tar, f"bin/{name}", kind=tarfile.SYMTYPE, target="busybox")
        _add(tar, "etc/passwd", _PASSWD.encode())
        _add(tar, "etc/group", _GROUP.encode())
    return out.getvalue()


def python_layer(scratch: Path) -> bytes:
    """Return a tar with the guest OS's own Python and its standard library, for an image without anything else."""
    packages = paths.state_dir() / "guest" / "packages"
    tree = scratch / "python"
    for pattern in ("python3.*-minimal", "libpython3.*-minimal", "libpython3.*-stdlib", "libc6", "zlib1g", "libexpat1"):
        newest = max(packages.glob(f"{pattern}_*.deb"), key=lambda path: path.stat().st_mtime)
        subprocess.run(["dpkg-deb", "-x", str(newest), str(tree)], check=True)
    for name in ("lib", "lib64"):
        top = tree / name
        if top.is_dir() and not top.is_symlink():
            subprocess.run(["cp", "-a", f"{top}/.", f"{tree}/usr/{name}/"], check=True)
            shutil.rmtree(top)
            top.symlink_to(f"usr/{name}")
    binary = next((tree / "usr/bin").glob("python3.*"))
    (tree / "usr/bin/python3").symlink_to(binary.name)
    done = subprocess.run(
        ["tar", "-C", str(tree), "--owner=0", "--group=0", "-c", "."], check=True, capture_output=True
    )
    return done.stdout


def file_layer(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    """Return a tar with these files; a name that begins with `.wh.` removes one of the layers below."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            _add(tar, name, content, mode=mode)
    return out.getvalue()


def write_archive(path: Path, name: str, layers: Sequence[bytes], **config: object) -> Path:
    """Write an OCI archive of one image; `config` goes into the image's own config (Cmd, Env, User, ...)."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"digest": f"sha256:{digest}", "size": len(data)}

    kind = "application/vnd.oci.image"
    packed = [{"mediaType": f"{kind}.layer.v1.tar+gzip", **blob(gzip.compress(layer, 1, mtime=0))} for layer in layers]
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"], **config},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    described = {"mediaType": f"{kind}.config.v1+json", **blob(json.dumps(image).encode())}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": described,
        "layers": packed,
    }
    entry = {
        "mediaType": f"{kind}.manifest.v1+json",
        **blob(json.dumps(manifest).encode()),
        "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name},
    }
    with tarfile.open(path, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        for digest, data in blobs.items():
            _add(tar, f"blobs/sha256/{digest}", data)
    return path


def _add(
    tar: tarfile.TarFile,
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    target: str = "",
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, target, len(content)
    tar.addfile(info, io.BytesIO(content))


def _from_deb(package: Path, name: str) -> bytes:
    """Return a program of a Debian package: an ar archive with a tar of any compression (deb(5))."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as files:
        member = next(m for m in files if m.isfile() and m.name.endswith(f"/{name}") and m.size > 100_000)
        extracted = files.extractfile(member)
        assert extracted is not None
        return extracted.read()

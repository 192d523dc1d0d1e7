"""Lays volumes out on disk as the kubelet does, so that the shim meets what it will meet on a node."""

from __future__ import annotations

import itertools
import os
import subprocess
import uuid
from pathlib import Path

import cri_v1 as cri

_counter = itertools.count(1)


class PodVolumes:
    """The volumes of one pod below `<root>/pods/<uid>`; `close` unmounts what was mounted."""

    def __init__(self, root: Path) -> None:
        self.base = root / "pods" / str(uuid.uuid4())
        self._mounted: list[Path] = []

    def close(self) -> None:
        for path in reversed(self._mounted):
            subprocess.run(["umount", "-l", str(path)], check=True)

    def _place(self, plugin: str, name: str) -> Path:
        path = self.base / "volumes" / f"kubernetes.io~{plugin}" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def empty_dir(self, name: str, *, memory: bool = False, group: int = 0) -> Path:
        path = self._place("empty-dir", name)
        if memory:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
            self._mounted.append(path)
        if group:
            os.chown(path, 0, group)
            path.chmod(0o2777)
        else:
            path.chmod(0o777)
        return path

    def atomic(self, plugin: str, name: str, files: dict[str, str]) -> Path:
        """Write a ConfigMap (`configmap`), Secret (`secret`), projected or downward-api volume, or change it: as the
        kubelet's atomic writer does, by a new directory and one link that turns."""
        path = self._place(plugin, name)
        stamp = f"..2026_01_01_00_00_00.{next(_counter):010}"
        (path / stamp).mkdir()
        for key, text in files.items():
            target = path / stamp / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        data = path / "..data"
        old = os.readlink(data) if data.is_symlink() else ""
        (path / "..data_tmp").symlink_to(stamp)
        (path / "..data_tmp").rename(data)
        for key in {key.split("/")[0] for key in files}:
            if not (path / key).is_symlink():
                (path / key).symlink_to(f"..data/{key}")
        for entry in path.iterdir():
            if not entry.name.startswith("..") and not entry.exists():
                entry.unlink()
        if old:
            subprocess.run(["rm", "-rf", str(path / old)], check=True)
        return path

    def sub_path(self, volume: Path, below: str, container: str) -> Path:
        """Bind a part of a volume to where the kubelet puts subPaths."""
        source = volume / below
        place = self.base / "volume-subpaths" / volume.name / container / "0"
        if source.is_dir():
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True)
            place.touch()
        subprocess.run(["mount", "--bind", str(source.resolve()), str(place)], check=True)
        self._mounted.append(place)
        return place

    def message_file(self, container: str) -> Path:
        path = self.base / "containers" / container / uuid.uuid4().hex[:8]
        path.parent.mkdir(parents=True)
        path.touch()
        path.chmod(0o666)
        return path


def mount(source: Path, target: str, *, readonly: bool = False) -> cri.Mount:
    return cri.Mount(host_path=str(source), container_path=target, readonly=readonly)

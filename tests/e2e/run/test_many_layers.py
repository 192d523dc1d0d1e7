"""An image may have more layers than a microVM has disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from microvms import Remora
from remora.errors import NotFoundError
from remora.images.build import build_image
from remora.images.store import ImageStore
from remora.vmm.qemu import MAX_DISKS

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

COUNT = MAX_DISKS + 4


@pytest.fixture
def many(image: str, tmp_path: Path) -> Iterator[str]:
    """An image of COUNT layers more than `image`, each with a file of its own and one that it replaces."""
    store, names = ImageStore(), [image]
    for number in range(COUNT):
        (tmp_path / "mine").write_text(f"{number}\n")
        (tmp_path / "remora.toml").write_text(
            f'[image]\nname = "{image}-{number}"\nbase = "{names[-1]}"\n'
            f'[files]\n"/srv/layer-{number}" = "mine"\n"/srv/last" = "mine"\n'
        )
        names.append(build_image(store, tmp_path).name)
    assert len(store.get(names[-1]).layers) > MAX_DISKS
    yield names[-1]
    for name in reversed(names[1:]):
        try:
            store.remove(name)
        except NotFoundError:
            continue


def test_an_image_with_more_layers_than_disks_runs_and_shows_all_of_them(remora: Remora, many: str) -> None:
    done = remora("run", "--no-accel", many, "sh", "-c", "ls /srv | grep -c layer-; cat /srv/last")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [str(COUNT), str(COUNT - 1)]

"""An archive that Remora writes is an image that Remora reads, and equal input gives equal bytes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from remora.images.importer import import_image
from remora.images.model import ImageConfig, machine_architecture
from remora.images.oci_archive import write_oci_archive
from remora.images.store import ImageStore

CONFIG = ImageConfig(
    entrypoint=("hello",), cmd=("world",), env={"PATH": "/bin", "LANG": "C"}, user="65532:65532", labels={"a": "b"}
)


def layer(path: Path, name: str) -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    return path


def test_what_was_written_is_imported_with_layers_configuration_and_name(tmp_path: Path) -> None:
    layers = [layer(tmp_path / "1.tar", "one"), layer(tmp_path / "2.tar", "two")]
    digest = write_oci_archive(tmp_path / "image.tar", "localhost/x:1", layers, CONFIG, machine_architecture())
    image = import_image(ImageStore(tmp_path / "store"), tmp_path / "image.tar")
    assert "x:1" in image.name
    assert digest.startswith("sha256:")
    assert len(image.layers) == 2
    assert image.config == CONFIG


def test_equal_input_gives_an_equal_archive_and_nothing_else_is_left(tmp_path: Path) -> None:
    layers = [layer(tmp_path / "1.tar", "one")]
    written = []
    for name in ("a.tar", "b.tar"):
        write_oci_archive(tmp_path / name, "localhost/x:1", layers, CONFIG, "amd64")
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert {path.name for path in tmp_path.iterdir()} == {"1.tar", "a.tar", "b.tar"}

"""Importing: every form an image comes in, every digest checked, and nothing left of what failed."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest

from image_maker import INDEX, Layout, describe, directory, docker_archive, member, symlink, tar
from remora.errors import DataLossError, InvalidArgumentError, NotFoundError, RemoraError, ResourceExhaustedError
from remora.images.importer import import_image
from remora.images.limits import Limits
from remora.images.store import ImageStore

LOWER = tar(directory("etc"), member("etc/a", b"lower"), member("etc/b", b"b"))
UPPER = tar(directory("etc"), member("etc/a", b"upper"), member("etc/.wh.b"))
CONFIG: dict[str, object] = {
    "Entrypoint": ["/bin/tool"],
    "Cmd": ["--help"],
    "Env": ["PATH=/bin", "EMPTY=", "EQUALS=a=b"],
    "WorkingDir": "/work",
    "User": "1000:1000",
    "Labels": {"who": "me"},
    "ExposedPorts": {"80/tcp": {}},
    "StopSignal": "SIGINT",
}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "my-image")


def _left(store: ImageStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file() and path.name != "lock")


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_layout_becomes_layers_and_configuration(store: ImageStore, layout: Layout, compression: str) -> None:
    image = import_image(store, layout.index(layout.image([LOWER, UPPER], compression=compression, config=CONFIG)))
    assert store.get("my-image") == image
    assert [describe(layer)["/etc/a"][4] for layer in image.layers] == [b"lower", b"upper"]
    config = image.config
    assert (config.entrypoint, config.cmd, config.cwd, config.user) == (
        ("/bin/tool",),
        ("--help",),
        "/work",
        "1000:1000",
    )
    assert dict(config.env) == {"PATH": "/bin", "EMPTY": "", "EQUALS": "a=b"}
    assert (dict(config.labels), config.exposed_ports, config.stop_signal) == ({"who": "me"}, ("80/tcp",), "SIGINT")


def test_equal_layers_are_stored_once_whatever_packed_them(store: ImageStore, tmp_path: Path) -> None:
    for number, compression in enumerate(("gzip", "zstd", "none")):
        layout = Layout(tmp_path / str(number))
        import_image(store, layout.index(layout.image([LOWER], compression=compression)), name=f"i{number}")
    assert len({layer for image in store.list() for layer in image.layers}) == 1
    assert len(list(store.layers_dir.iterdir())) == 1


def test_a_tar_is_as_good_as_a_directory(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    directory_path = layout.index(layout.image([LOWER]))
    archive = layout.as_tar(tmp_path / "my-image.tar")
    compressed = tmp_path / "packed.tar.gz"
    compressed.write_bytes(gzip.compress(archive.read_bytes()))
    digests = {import_image(store, path, name="x").digest for path in (directory_path, archive, compressed)}
    assert len(digests) == 1


def test_a_docker_archive_brings_its_tag(store: ImageStore, tmp_path: Path) -> None:
    image = import_image(store, docker_archive(tmp_path / "saved.tar", [LOWER, UPPER], ["team/tool:7"], CONFIG))
    assert image.name == "team/tool:7"
    assert image.config.entrypoint == ("/bin/tool",)
    assert len(image.layers) == 2


def test_a_docker_archive_may_link_equal_layers(store: ImageStore, tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "saved.tar", [LOWER, LOWER], ["a:1"])
    with tarfile.open(path) as archive:
        kept = [(info, f.read() if (f := archive.extractfile(info)) else b"") for info in archive.getmembers()]
    kept = [
        symlink("1/layer.tar", "../0/layer.tar") if info.name == "1/layer.tar" else (info, data) for info, data in kept
    ]
    path.write_bytes(tar(*kept))
    # overlayfs refuses a layer twice, and the upper one hides the lower one anyway
    assert len(import_image(store, path).layers) == 1


def test_the_manifest_of_this_machine_is_taken_from_an_index(store: ImageStore, layout: Layout) -> None:
    ours = layout.image([UPPER], architecture="amd64")
    other = layout.image([LOWER], architecture="riscv64")
    attestation = {**layout.image([LOWER]), "platform": {"os": "unknown", "architecture": "unknown"}}
    nested = json.dumps({"schemaVersion": 2, "manifests": [attestation, other, ours]}).encode()
    path = layout.index(layout.blob(nested, INDEX))
    image = import_image(store, path, architecture="amd64")
    assert image.digest == ours["digest"]
    with pytest.raises(NotFoundError, match=r"not there for linux/sparc.*linux/riscv64, linux/amd64"):
        import_image(store, path, architecture="sparc")


def test_several_images_need_a_choice(store: ImageStore, layout: Layout) -> None:
    key = "org.opencontainers.image.ref.name"
    path = layout.index(
        layout.image([LOWER], annotations={key: "example/one:1"}), layout.image([UPPER], annotations={key: "two"})
    )
    with pytest.raises(InvalidArgumentError, match=r"several images: example/one:1, two.*--ref"):
        import_image(store, path)
    assert import_image(store, path, reference="one:1").name == "example/one:1"
    assert import_image(store, path, reference="two").name == "my-image:two"
    with pytest.raises(NotFoundError, match="has no image 'three'"):
        import_image(store, path, reference="three")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["manifest", "config", "layer"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_no_byte_goes_unchecked(store: ImageStore, layout: Layout, part: str, damage: str) -> None:
    descriptor = layout.image([LOWER], compression="none")
    blobs = layout.path / "blobs/sha256"
    manifest_path = blobs / str(descriptor["digest"]).removeprefix("sha256:")
    manifest = json.loads(manifest_path.read_text())
    victims = {"manifest": descriptor, "config": manifest["config"], "layer": manifest["layers"][0]}
    victim = blobs / str(victims[part]["digest"]).removeprefix("sha256:")
    if damage == "flip":
        _flip(victim)
    elif damage == "truncate":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        victim.unlink()
    with pytest.raises(RemoraError, match=r"digest|bytes instead of|missing|checksum"):
        import_image(store, layout.index(descriptor))
    assert _left(store) == []


def test_a_layer_must_unpack_to_its_diff_id(store: ImageStore, layout: Layout) -> None:
    wrong = "sha256:" + "0" * 64
    with pytest.raises(DataLossError, match="the unpacked layer has the digest"):
        import_image(store, layout.index(layout.image([LOWER], diff_ids=[wrong])))
    assert _left(store) == []


def test_layers_done_before_a_failure_are_taken_back(store: ImageStore, layout: Layout) -> None:
    hostile = tar(member("../x", b""))
    with pytest.raises(InvalidArgumentError, match="climbs out"):
        import_image(store, layout.index(layout.image([LOWER, hostile])))
    assert _left(store) == []


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_is_stopped_early(store: ImageStore, layout: Layout, compression: str) -> None:
    bomb = tar(member("zeros", bytes(30_000_000)))
    path = layout.index(layout.image([bomb], compression=compression))
    with pytest.raises(ResourceExhaustedError, match="bomb"):
        import_image(store, path, limits=Limits(ratio_floor_bytes=1_000_000))
    with pytest.raises(ResourceExhaustedError, match="the limit for one layer"):
        import_image(store, path, limits=Limits(max_bytes=1_000_000))
    assert _left(store) == []


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_cut_off_stream_is_refused(store: ImageStore, layout: Layout, compression: str) -> None:
    from image_maker import packed

    whole = packed(tar(member("f", os.urandom(300_000))), compression)
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}}
    ).encode()
    manifest = {"config": layout.blob(config, "c"), "layers": [layout.blob(whole[:-20_000], "l")]}
    with pytest.raises(InvalidArgumentError, match=r"cut off|damaged"):
        import_image(store, layout.index(layout.blob(json.dumps(manifest).encode(), "m")))


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        "nonsense",
        '{"manifests": []}',
        '{"manifests": [5]}',
        '{"manifests": [{}]}',
        '{"manifests": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}',
        "[" * 100_000,
    ],
)
def test_a_malformed_index_is_an_error_of_ours(store: ImageStore, layout: Layout, index: str) -> None:
    (layout.path / "index.json").write_text(index)
    with pytest.raises(RemoraError):
        import_image(store, layout.path)


def test_a_layout_may_not_link_to_files_of_the_host(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    descriptor = layout.image([LOWER], compression="none")
    secret = tmp_path / "secret"
    blob = layout.path / "blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")
    blob.rename(secret)
    blob.symlink_to(secret)
    with pytest.raises(InvalidArgumentError, match="a link out of"):
        import_image(store, layout.index(descriptor))


def test_what_is_no_image_is_named(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no"):
        import_image(store, tmp_path / "absent")
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"\xff\xd8\xff\xe0" * 300)
    with pytest.raises(InvalidArgumentError, match="no tar archive"):
        import_image(store, picture)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidArgumentError, match=r"neither index.json nor manifest.json.*docker save"):
        import_image(store, empty)

"""`remora image`: the images that microVMs are made from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remora.images.model import Image

NAME = "image"
HELP = "import, pull, build, list, show and remove images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    importing = actions.add_parser("import", help="import an OCI layout (directory or tar) or a docker save archive")
    importing.add_argument("source", type=Path, metavar="PATH")
    importing.add_argument("--name", help="what to call it (default: the archive's name for it)")
    importing.add_argument("--ref", help="which image to take when the archive has several")

    pulling = actions.add_parser("pull", help="pull an image from a registry, through skopeo")
    pulling.add_argument("reference", metavar="IMAGE", help="as in docker pull, or any source that skopeo knows")
    pulling.add_argument("--name", help="what to call it (default: its name in the registry)")
    pulling.add_argument("--no-tls-verify", action="store_true", help="accept plain HTTP and unknown certificates")

    building = actions.add_parser("build", help="build a function's image from the remora.toml in its directory")
    building.add_argument("directory", type=Path, nargs="?", default=Path(), metavar="DIRECTORY")
    building.add_argument("--name", help="what to call it (default: as in remora.toml)")
    building.add_argument("--refresh", action="store_true", help="make the base anew from today's packages")

    listing = actions.add_parser("list", help="list images")
    showing = actions.add_parser("show", help="show how an image is made up and what it starts")
    showing.add_argument("name", metavar="IMAGE")
    for reader in (listing, showing):
        reader.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")

    removing = actions.add_parser("remove", help="remove images and the layers that no other image needs")
    removing.add_argument("names", metavar="IMAGE", nargs="+")

    guest = actions.add_parser("guest", help="build the guest OS image that every microVM boots")
    guest.add_argument("--force", action="store_true", help="build it again even if it is there")


def run(args: argparse.Namespace) -> int:
    """Run one action; returns the exit status."""
    actions = {
        "import": _import,
        "pull": _pull,
        "build": _build,
        "list": _list,
        "show": _show,
        "remove": _remove,
        "guest": _guest,
    }
    actions[args.action](args)
    return 0


def _import(args: argparse.Namespace) -> None:
    from remora.cli._progress import Reporter
    from remora.images.importer import import_image
    from remora.images.store import ImageStore

    with Reporter() as reporter:
        image = import_image(ImageStore(), args.source, name=args.name, reference=args.ref, progress=reporter.bytes)
    _tell(image)


def _pull(args: argparse.Namespace) -> None:
    from remora.cli._progress import Reporter
    from remora.images.pull import pull_image
    from remora.images.store import ImageStore

    with Reporter() as reporter:
        image = pull_image(
            ImageStore(), args.reference, name=args.name, tls_verify=not args.no_tls_verify, progress=reporter.bytes
        )
    _tell(image)


def _build(args: argparse.Namespace) -> None:
    from remora.cli._progress import Reporter
    from remora.images.build import build_image
    from remora.images.store import ImageStore

    with Reporter() as reporter:
        image = build_image(ImageStore(), args.directory, name=args.name, refresh=args.refresh, progress=reporter.steps)
    _tell(image)


def _list(args: argparse.Namespace) -> None:
    from remora.images.store import ImageStore

    images = ImageStore().list()
    if args.json:
        import json

        print(json.dumps([_as_json(image) for image in images], indent=2))
        return
    rows = [("NAME", "DIGEST", "LAYERS", "SIZE")]
    rows += [(i.name, i.digest[7:19], str(len(i.layers)), megabytes(i.size_bytes)) for i in images]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(args: argparse.Namespace) -> None:
    import json

    from remora.images.store import ImageStore

    image = ImageStore().get(args.name)
    if args.json:
        print(json.dumps(_as_json(image), indent=2))
        return
    config = image.config
    print(f"{image.name}  {image.digest}  linux/{image.architecture}  {megabytes(image.size_bytes)}")
    for label, value in (
        ("entrypoint", json.dumps(config.entrypoint)),
        ("cmd", json.dumps(config.cmd)),
        ("workdir", config.cwd),
        ("user", config.user or "root"),
        ("stop signal", config.stop_signal),
        ("ports", " ".join(config.exposed_ports)),
    ):
        print(f"  {label:<12}{value}")
    for key, value in config.env.items():
        print(f"  {'env':<12}{key}={value}")
    for key, value in config.labels.items():
        print(f"  {'label':<12}{key}={value}")
    for layer in image.layers:
        print(f"  {'layer':<12}{layer.stem[:12]}  {megabytes(layer.stat().st_size)}")


def _remove(args: argparse.Namespace) -> None:
    from remora.images.store import ImageStore

    store = ImageStore()
    for name in args.names:
        freed = store.remove(name)
        print(f"removed {name}, {megabytes(freed)} are free again")


def _guest(args: argparse.Namespace) -> None:
    from remora import paths
    from remora.cli._progress import Reporter
    from remora.sandboxes.guest_files import renew_guest_files

    with Reporter() as reporter:
        files = renew_guest_files(paths.state_dir(), reporter.fraction, force=args.force)
    print(files.disk.parent)


def _tell(image: Image) -> None:
    print(f"{image.name}  {image.digest[7:19]}  {len(image.layers)} layers, {megabytes(image.size_bytes)}")


def _as_json(image: Image) -> dict[str, object]:
    return {
        "name": image.name,
        "digest": image.digest,
        "architecture": image.architecture,
        "created": image.created,
        "size_bytes": image.size_bytes,
        "layers": [
            {"diff_id": diff_id, "path": str(path), "size_bytes": path.stat().st_size}
            for diff_id, path in zip(image.diff_ids, image.layers, strict=True)
        ],
        "config": image.config.to_dict(),
    }


def megabytes(size_bytes: int) -> str:
    """Return a size for people, in MB of 10^6 bytes."""
    return f"{size_bytes / 1e6:.1f} MB"

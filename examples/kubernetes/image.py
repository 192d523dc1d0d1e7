"""Builds the service's container image without a registry: Debian's Python and a file. The microVM brings the SDK.

python examples/kubernetes/image.py          # build/classify.tar
ctr -n k8s.io images import build/classify.tar
"""

import argparse
import sys
import tempfile
from pathlib import Path

from remora.images.base import SOURCE_DATE_EPOCH, make_base_tar
from remora.images.model import ImageConfig, machine_architecture
from remora.images.oci_archive import write_oci_archive
from remora.images.tree_tar import LowerLayers, write_tree_tar

NAME = "localhost/remora/classify:1"
SERVICE = Path(__file__).resolve().parent.parent / "classify/service.py"


def build(output: Path) -> str:
    """Write the archive; return the image's digest."""
    with tempfile.TemporaryDirectory(prefix="remora-image-") as scratch_name, LowerLayers(()) as lower:
        scratch = Path(scratch_name)
        base, service = scratch / "base.tar", scratch / "service.tar"
        make_base_tar(scratch, base, "bookworm", "minimal", ("libpython3-stdlib", "python3-minimal"), lambda *_: None)
        write_tree_tar(service, {"/srv/service.py": SERVICE}, lower, SOURCE_DATE_EPOCH)
        config = ImageConfig(
            entrypoint=("python3", "-u", "/srv/service.py"),
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            user="65532:65532",
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        return write_oci_archive(output, NAME, [base, service], config, machine_architecture())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/classify.tar"), metavar="FILE")
    args = parser.parse_args()
    print(f"{NAME}  {build(args.output)}  {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

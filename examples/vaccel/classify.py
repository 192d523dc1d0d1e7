"""Classify a picture with vAccel's names: `python classify.py picture.jpg`."""

import sys
from pathlib import Path

from remora.vaccel import PluginType, Session


def main(path: str) -> None:
    session = Session(flags=PluginType.REMOTE)
    tags, _image_name = session.classify(Path(path).read_bytes())
    print(tags)


if __name__ == "__main__":
    main(sys.argv[1])

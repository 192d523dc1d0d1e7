r"""A function that says what is on pictures. It runs in a microVM without an accelerator, a driver or an ML library.

Remora carries each picture to the host's accelerator and the answer back; `remora` needs no installation, every
microVM has it. On a laptop the same file runs against a local agent:

    remora agent --listen unix:///tmp/accel.sock &
    export REMORA_ADDRESS=unix:///tmp/accel.sock
    (printf 'dog.jpg %d\n' "$(stat -c %s dog.jpg)"; cat dog.jpg) | python function.py

In comes, for each picture, a line `NAME SIZE` and then SIZE bytes of JPEG, PNG or another format the agent reads.
Out goes one line of JSON for each: {"name": ..., "labels": [[index, name, score], ...], "ms": ...}.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

import remora


def pictures(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each picture until the stream ends."""
    for header in stream:
        name, size = header.decode().rsplit(" ", 1)
        yield name, stream.read(int(size))


def main() -> None:
    with remora.connect() as session:
        session.ping()  # the way to the agent is open before the first picture comes
        remora.ready()  # a template is taken here, and every clone goes on from here
        for name, picture in pictures(sys.stdin.buffer):
            start = time.perf_counter()
            labels = session.classify(picture, top=5)
            answer = {
                "name": name,
                "labels": [[label.index, label.name, label.score] for label in labels],
                "ms": round((time.perf_counter() - start) * 1000, 3),
            }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

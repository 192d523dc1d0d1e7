"""Cases from cases: the blind half of fuzzing, for volume and where atheris is not installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

_INTERESTING = (
    *(b"\x00", b"\x01", b"\x7f", b"\x80", b"\xff", b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"),
    *(b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\x00" * 8, b"\xff" * 8, b"\x00\x00\xc0\x7f", b"\xff\xff\xff\xff\x0f"),
)


def _flip(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.randrange(256)


def _nudge(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    """Lengths and counts that are off by little."""
    if data:
        at = random.randrange(len(data))
        data[at] = (data[at] + random.randrange(-4, 5)) & 255


def _insert(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.choice(_INTERESTING)


def _overwrite(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    piece = random.choice(_INTERESTING)
    if len(data) >= len(piece):
        at = random.randrange(len(data) - len(piece) + 1)
        data[at : at + len(piece)] = piece


def _cut(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        at = random.randrange(len(data))
        del data[at : at + 1 + random.randrange(min(64, len(data) - at))]


def _repeat(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        at = random.randrange(len(data))
        piece = data[at : at + 1 + random.randrange(32)]
        data[at:at] = piece * (1 + random.randrange(8))


def _splice(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = random.choice(others)
    if other:
        at, start = random.randrange(len(data) + 1), random.randrange(len(other))
        data[at : at + random.randrange(64)] = other[start : start + 1 + random.randrange(256)]


_CHANGES: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    *(_flip, _set, _nudge, _nudge, _insert, _overwrite, _cut, _repeat, _splice),
)


def mutate(random: Random, corpus: Sequence[bytes], most_bytes: int) -> bytes:
    """Return a case of the corpus with a few changes."""
    data = bytearray(random.choice(corpus))
    for _ in range(1 << random.randrange(4)):
        random.choice(_CHANGES)(random, data, corpus)
    return bytes(data[:most_bytes])

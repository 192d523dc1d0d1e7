"""SHA-256 by Python's own C module: `hashlib` would load OpenSSL, 2 ms and half a MiB of every process that stays."""

from __future__ import annotations

try:
    from _sha256 import sha256  # type: ignore[import-not-found]
except ImportError:
    from _sha2 import sha256  # type: ignore[import-not-found]


def hexdigest(data: bytes) -> str:
    """Return the digest as 64 hexadecimal digits."""
    text: str = sha256(data).hexdigest()
    return text

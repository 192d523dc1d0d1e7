"""Says why a microVM's monitor process ended, as an error that its owner can act on."""

from __future__ import annotations

import signal
from pathlib import Path

from remora.errors import FailedPreconditionError, RemoraError, ResourceExhaustedError, UnavailableError
from remora.vmm.contract import Ended
from remora.vmm.drivers import DEFAULT, TITLES


def why_ended(ended: Ended, ram_file: Path | None = None, *, monitor: str = DEFAULT) -> RemoraError:
    """Return the reason.

    Args:
        ram_file: The file that held the guest's memory, if one did.
        monitor: Name of the driver whose process it was.
    """
    title = TITLES[monitor]
    last_words = ended.console.strip().splitlines()[-3:]
    console = f"; its console ended with: {' | '.join(last_words)}" if last_words else ""
    if ended.signal == signal.SIGBUS and ram_file is not None:
        return ResourceExhaustedError(
            f"the disk under {ram_file.parent} became full", fix="free some space there, and try again"
        )
    if ended.signal:
        return UnavailableError(f"{title} was killed by signal {ended.signal} ({signal.strsignal(ended.signal)})")
    if ended.status:
        return FailedPreconditionError(f"{title} ended with status {ended.status}{console}")
    return UnavailableError(f"the guest powered off by itself{console}")

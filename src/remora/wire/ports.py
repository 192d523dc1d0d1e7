"""Channel ports of the accelerator. By themselves, because PID 1 of a guest needs them and no message."""

from __future__ import annotations

#: ttrpc: `remora.v1` and vAccel, whose default it is.
PORT = 2048
#: The Open Inference Protocol, where the agent offers it to sandboxes.
OIP_PORT = 8000

"""The asyncio twin of the package's top: `async with remora.aio.connect() as session: ...`, with the same names."""

from __future__ import annotations

from remora.client.aio import AsyncModel as Model
from remora.client.aio import AsyncSession as Session
from remora.client.aio import connect
from remora.client.tensors import Tensor
from remora.client.values import Label, ModelInfo, TensorSpec

__all__ = ["Label", "Model", "ModelInfo", "Session", "Tensor", "TensorSpec", "connect"]

"""ONNX Runtime's telemetry must be off before its import, in tests too."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

"""What is fuzzed: one module for each border that strangers' bytes cross."""

from __future__ import annotations

NAMES = (
    "protobuf",
    "ttrpc_frames",
    "ttrpc_client",
    "mux",
    "guest_control",
    "policy",
    "native",
    "vaccel",
    "vaccel_stream",
    "oip_rest",
    "oip_grpc",
    "metrics_http",
    "autoscaling",
)

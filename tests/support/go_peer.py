"""Builds and runs the Go program in tests/contract/ttrpc/go: containerd's own ttrpc at the other end of a socket."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from google.protobuf import json_format

from vaccel_schema import METHODS, Schema, file_set

SOURCES = Path(__file__).parents[1] / "contract/ttrpc/go"
_BUILD_TIMEOUT_S = 300


def build(directory: Path) -> Path:
    """Return the built program, or skip the test and say what is missing."""
    if shutil.which("go") is None:
        pytest.skip("the `go` command is missing: install Go 1.26 or newer")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}

    def go(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["go", *arguments],
            cwd=SOURCES,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )

    fetched = go("mod", "download", "github.com/containerd/ttrpc")
    if fetched.returncode:
        pytest.skip(f"the Go modules cannot be fetched: {fetched.stderr.strip()[-200:]}")
    program = directory / "peer"
    built = go("build", "-o", str(program), ".")
    assert built.returncode == 0, built.stderr
    return program


class Peer:
    """A running peer."""

    def __init__(self, program: Path, role: str, socket: Path, directory: Path) -> None:
        self.schema = Schema()
        descriptors = directory / "descriptors.pb"
        descriptors.write_bytes(file_set().SerializeToString())
        self._process = subprocess.Popen(
            [program, role, socket, descriptors], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the Go program has ended"
        return json.loads(line)

    def call(self, service: str, method: str, *messages: Any) -> tuple[int, str, Any, Any]:
        """Return (code, message, the first detail as vaccel.Error, the response); call a stream with many messages."""
        types = self.types(method)
        told = [json_format.MessageToDict(message) for message in messages]
        self.tell({"service": service, "method": method, "messages": told, "stream": method == "GenopStream"} | types)
        answer = self.hear()
        error = response = None
        if answer["details"]:
            error = self.schema.of("vaccel.Error").FromString(base64.b64decode(answer["details"][0]))
        if not answer["code"]:
            response = json_format.ParseDict(answer["response"], self.schema.of(types["response_type"])())
        return answer["code"], answer["message"], error, response

    @staticmethod
    def types(method: str) -> dict[str, str]:
        request, response = METHODS.get(method, ("empty.Empty", "empty.Empty"))
        return {"request_type": f"vaccel.{request}", "response_type": f"vaccel.{response}"}

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()


def wait_for(socket: Path) -> None:
    deadline_s = time.monotonic() + 10
    while not socket.exists():
        assert time.monotonic() < deadline_s, f"{socket} did not appear"
        time.sleep(0.01)

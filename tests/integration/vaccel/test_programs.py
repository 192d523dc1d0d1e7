"""vaccel-python's documented programs with another import, and `remora.vaccel` at a real agent."""

from __future__ import annotations

import array
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent_process import AgentProcess
from remora.vaccel import Arg, ArgType, FFIError, Resource, ResourceType, Session
from remora.vaccel.ops import tf, torch
from remora.vaccel.ops.tf import lite

EXAMPLES = Path(__file__).parents[3] / "examples/vaccel"


def run(agent: AgentProcess, name: str, *arguments: str) -> str:
    environment = {**os.environ, "VACCEL_RPC_ADDRESS": agent.address}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_classify_program(agent: AgentProcess, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.effect_noise((300, 200), 80).convert("RGB").save(path)
    assert run(agent, "classify.py", str(path)).strip()


def test_the_model_programs(agent: AgentProcess, models: Path) -> None:
    model = str(models / "identity" / "model.onnx")
    assert run(agent, "torch_run.py", model) == "dims [1, 1, 1, 1] data [2.5]\n"
    assert run(agent, "tf_run.py", model) == "tf [1.5] status 0\ntflite [3.5] status 0\n"


def test_the_arithmetic_program(agent: AgentProcess) -> None:
    assert run(agent, "arithmetic.py").splitlines() == [
        "sgemm [4.0, 5.0, 10.0, 11.0]",
        "minmax 5.0 40.0",
        "arraycopy [1, 2, 3]",
        "mmult [2.0, 1.0, 4.0, 3.0]",
        "parallel ([4.0, 6.0], [3.0, 8.0])",
        "vadd [4.0, 6.0]",
        "genop [7, 8, 9]",
    ]


def test_the_library_program_is_told_the_rule(agent: AgentProcess) -> None:
    first, second = run(agent, "library.py").splitlines()
    assert first.startswith("exec 1 exec is off")
    assert "exec = false" in first
    assert second == "exec_with_resource 1"


@pytest.mark.usefixtures("pointed")
def test_what_goes_in_as_numpy_or_a_buffer_comes_out_as_that() -> None:
    with Session() as session:
        ones = np.ones((2, 2), np.float32)
        product = session.sgemm(2, 2, 2, 1.0, ones, 2, ones, 2, 0.0, 2)
        assert isinstance(product, np.ndarray)
        assert product.tolist() == [2, 2, 2, 2]
        assert session.fpga_vadd(array.array("f", [1]), array.array("f", [2])) == array.array("f", [3])
        copied = np.zeros(4, np.int32)
        session.genop([Arg(18, ArgType.UINT8), Arg(np.arange(4, dtype=np.int32))], [Arg(copied)])
        assert copied.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("pointed")
def test_a_resource_is_shared_synced_and_sent_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    folder, numbers = Resource(tmp_path, ResourceType.DATA), Resource.from_numpy(np.arange(4))
    with Session() as one, Session() as two:
        folder.register(one)
        numbers.register(one)
        numbers.register(two)
        assert one.has_resource(folder)
        assert not two.has_resource(folder)
        numbers.sync(two)
        first = numbers.remote_id
        numbers.unregister(one)
        numbers.unregister(two)
        numbers.register(one)
        assert numbers.remote_id not in (0, first)
        with pytest.raises(FFIError) as caught:
            numbers.unregister(two)
        assert caught.value.code == errno.EINVAL


@pytest.mark.usefixtures("pointed")
def test_errors_carry_errno_and_status(identity: bytes) -> None:
    with Session() as session:
        model = Resource.from_buffer(identity, ResourceType.MODEL)
        tensor = tf.Tensor.from_numpy(np.ones((1, 1, 1, 1)))
        cases: list[tuple[int, Any]] = [
            (errno.EIO, lambda: session.torch_model_load(model)),
            (errno.ENOTSUP, lambda: session.depth(b"picture")),
            (errno.EINVAL, lambda: session.classify(b"no picture")),
        ]
        model.remote_id = 5
        for code, attempt in cases:
            with pytest.raises(FFIError) as caught:
                attempt()
            assert caught.value.code == code
        model.remote_id = 0
        model.register(session)
        session.tf_model_load(model)
        with pytest.raises(FFIError, match=r"\[errno 22\] EINVAL: input 'input' is float64") as caught:
            session.tf_model_run(model, [tf.Node("input", 0)], [tensor], [tf.Node("output", 0)])
        assert caught.value.status is not None
        assert caught.value.status[0] == 3


@pytest.mark.usefixtures("pointed")
def test_tensors_keep_their_type_and_bytes() -> None:
    for cls, dtypes in ((torch.Tensor, 7), (tf.Tensor, 12), (lite.Tensor, 12)):
        assert len(cls.DTYPES) == dtypes
        for dtype in cls.DTYPES.values():
            values = np.arange(6).astype(dtype).reshape(2, 3)
            tensor = cls.from_numpy(values)
            assert (tensor.shape, tensor.to_bytes()) == ((2, 3), values.tobytes())
            assert tensor.data == values.ravel().tolist()
            np.testing.assert_array_equal(tensor.as_numpy(), values)
            assert cls(tensor.dims, tensor.data_type, tensor.data).to_bytes() == values.tobytes()

"""TorchScript inside a tenant's confined worker: it computes, and what it tries besides comes to nothing."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from agent_process import AgentProcess, Guest, running_agent
from remora.errors import DeadlineExceededError, InvalidArgumentError, PermissionDeniedError
from remora.wire import remora_v1

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install remora[torch]", exc_type=ImportError)

pytestmark = pytest.mark.timeout(240)
#: Of a worker's address space PyTorch and the CUDA libraries of its wheel take 3.3 GB by themselves.
CONFIG = '[workers]\nstop_grace_s = 0.1\ntenant_memory_bytes = 8589934592\n[tenant."trusted"]\nexec = true\n'
#: Importing PyTorch in a worker takes 2 s, and 10 s from a disk that has not read it lately.
LOAD_S = 120.0


AFFINE = """
def forward(self, x: Tensor, bias: Tensor) -> Tuple[Tensor, Tensor]:
    y = x @ self.weight + bias
    return y, y.argmax(dim=1)
"""
ENDLESS = """
def forward(self, x: Tensor) -> Tensor:
    while bool(x.sum() < 1e30):
        x = x * 1.0
    return x
"""
#: PyTorch maps a file, which a program may ask for.
READER = """
def forward(self, x: Tensor) -> Tensor:
    return torch.from_file("/etc/passwd", False, 16, dtype=torch.uint8)
"""


def program(code: str) -> Any:
    """Return a script module with a weight of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what vAccel sends
        module = type("Program", (torch.nn.Module,), {})()  # a class for each: PyTorch compiles one only once
        module.weight = torch.nn.Parameter(torch.arange(6, dtype=torch.float32).reshape(2, 3))
        scripted = torch.jit.script(module)
        scripted.define(code)
    return scripted


def saved(module: Any) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("a"), config=CONFIG) as running:
        for tenant in ("trusted", "other"):
            running.attach(tenant, tenant=tenant)
        yield running


@pytest.fixture
def guest(agent: AgentProcess) -> Iterator[Guest]:
    with Guest(agent.connect(agent.directory / "sandbox-trusted" / "channel.sock_2048")) as connected:
        yield connected


def loaded(guest: Guest, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    guest.upload(digest, data)
    request = remora_v1.LoadModelRequest(model=digest)
    guest.call("LoadModel", request, remora_v1.LoadModelResponse, timeout_s=LOAD_S)
    return digest


def run(guest: Guest, model: str, timeout_s: float = 30.0, **inputs: Any) -> list[Any]:
    tensors = [
        remora_v1.Tensor(name=name, dtype=str(array.dtype), shape=list(array.shape), data=array.tobytes())
        for name, array in inputs.items()
    ]
    request = remora_v1.InferRequest(model=model, inputs=tensors)
    answer = guest.call("Infer", request, remora_v1.InferResponse, timeout_s=timeout_s)
    return [np.frombuffer(out.data, out.dtype).reshape(tuple(out.shape)) for out in answer.outputs]


def test_a_module_answers_as_it_does_in_this_process(guest: Guest) -> None:
    module = program(AFFINE)
    model = loaded(guest, saved(module))
    x, bias = np.random.default_rng(1).random((4, 2), np.float32), np.ones(3, np.float32)
    expected = [part.detach().numpy() for part in module(torch.from_numpy(x), torch.from_numpy(bias))]
    found = run(guest, model, x=x, bias=bias)
    assert [array.dtype for array in found] == [np.float32, np.int64]
    assert all(np.allclose(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(InvalidArgumentError, match="the model takes x, bias"):
        run(guest, model, x=x)
    with pytest.raises(InvalidArgumentError, match="PyTorch cannot run the model"):
        run(guest, model, x=x[:, :1], bias=bias)


def test_a_module_that_does_not_return_costs_its_worker_and_the_next_call_has_a_new_one(guest: Guest) -> None:
    endless, model = loaded(guest, saved(program(ENDLESS))), loaded(guest, saved(program(AFFINE)))
    with pytest.raises(DeadlineExceededError):
        run(guest, endless, timeout_s=1.0, x=np.ones(1, np.float32))
    x, bias = np.zeros((1, 2), np.float32), np.arange(3, dtype=np.float32)
    assert run(guest, model, LOAD_S, x=x, bias=bias)[1].tolist() == [2]


def test_a_module_finds_no_file_of_the_host(guest: Guest) -> None:
    module = program(READER)
    assert len(module(torch.zeros(1))) == 16, "here it does"
    with pytest.raises(InvalidArgumentError, match=r"unable to open file .*/etc/passwd"):
        run(guest, loaded(guest, saved(module)), x=np.ones(1, np.float32))


def test_a_tenant_whose_programs_may_not_run_is_refused_with_the_rule(agent: AgentProcess) -> None:
    with (
        Guest(agent.connect(agent.directory / "sandbox-other" / "channel.sock_2048")) as guest,
        pytest.raises(PermissionDeniedError, match=r"TorchScript, which is a program.*exec = false"),
    ):
        loaded(guest, saved(program(AFFINE)))

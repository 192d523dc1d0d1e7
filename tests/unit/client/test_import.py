"""What a function pays for `import remora`, and that it gets by with the standard library of Python 3.9.

The guest's image has any Python from 3.9 on and nothing of ours but the package directory.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import remora
from fake_agent import FakeAgent

PACKAGE = Path(remora.__file__).parent
#: What the SDK's directory in a container holds; the rest of the package needs a newer Python.
GUEST_SIDE = ["__init__.py", "aio.py", "errors.py", "reactor.py", "client", "guest", "vaccel", "wire"]
RUNS = 7

ISOLATED = """
import sys
sys.path.insert(0, sys.argv[1])
standard = getattr(sys, "stdlib_module_names", None)  # Python 3.10; with -I -S nothing else can be found anyway

class Refuse:
    # Anything that is not of the standard library or ours is an error, even if it is installed.
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top != "remora" and standard is not None and top not in standard:
            raise AssertionError("the SDK imports " + name)

sys.meta_path.insert(0, Refuse())
import array, asyncio, os
import remora

for name in remora.__all__:
    assert getattr(remora, name) is not None, name
with remora.connect(sys.argv[2]) as session:
    assert session.infer("identity", {"x": array.array("f", [1, 2])})["x"].tolist() == [1, 2]
    assert session.load(b"a model").infer({"x": b"1"})["x"].tolist() == [49]
    assert len(session.classify(b"picture", top=2)) == 2
    assert session.ping() > 0
    pid = os.fork()
    if pid == 0:
        session.ping()
        session.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert session.ping() > 0
assert remora.ready() in (True, False)

import remora.vaccel
import remora.vaccel.ops.tf.lite
for name in remora.vaccel.__all__:
    assert getattr(remora.vaccel, name) is not None, name

async def twin():
    async with remora.aio.connect(sys.argv[2]) as session:
        model = await session.load(b"another model" * 200000)
        answers = await asyncio.gather(*(model.infer({"x": bytes([n])}) for n in range(50)))
        assert [answer["x"].tolist() for answer in answers] == [[n] for n in range(50)]
        cancelled = asyncio.ensure_future(session.ping())
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert await session.ping() > 0

asyncio.run(twin())
print("fine")
"""


def guest_side() -> list[Path]:
    paths = [PACKAGE / name for name in GUEST_SIDE]
    return sorted({module for path in paths for module in (path.rglob("*.py") if path.is_dir() else [path])})


def interpreter(minor: int) -> str:
    """Return a Python 3.`minor`: of PATH, or of pyenv, whose programs on PATH work for chosen versions only."""
    if minor == sys.version_info.minor:
        return sys.executable
    kept = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    on_path = shutil.which(f"python3.{minor}")
    for python in [*([on_path] if on_path else []), *map(str, kept.glob(f"3.{minor}.*/bin/python3.{minor}"))]:
        if not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
            return python
    pytest.skip(f"python3.{minor} is not installed")


@pytest.mark.parametrize("minor", range(9, 15), ids=lambda minor: f"python3.{minor}")
def test_the_sdk_works_isolated_with_nothing_but_its_own_directory(minor: int, tmp_path: Path) -> None:
    python = interpreter(minor)
    for name in GUEST_SIDE:
        source = PACKAGE / name
        target = tmp_path / "sdk/remora" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    with FakeAgent(tmp_path / "a.sock") as agent:
        done = subprocess.run(
            [python, "-I", "-S", "-B", "-W", "error", "-c", ISOLATED, str(tmp_path / "sdk"), agent.address],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.parametrize("path", guest_side(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_guest_side_module_is_python_3_9_and_imports_only_the_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(), str(path), feature_version=(3, 9))
    homes = ("errors", "wire", "client", "guest", "reactor", "aio", "vaccel")
    allowed = {f"remora.{home}" for home in homes}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from remora import aio` names a module, `from remora.errors import X` does not.
            names = [f"remora.{a.name}" for a in node.names] if node.module == "remora" else [node.module or ""]
        else:
            assert not isinstance(node, ast.Match), f"{path}:{node.lineno}: match came with Python 3.10"
            continue
        for name in names:
            top = name.partition(".")[0]
            ours = top == "remora" and (name == "remora" or any((name + ".").startswith(a + ".") for a in allowed))
            # numpy only inside functions that were given an array or asked for one.
            guarded = top == "numpy" and path.name == "tensors.py" and node.col_offset > 0
            assert ours or guarded or top in sys.stdlib_module_names, f"{path}:{node.lineno}: imports {name}"


def test_annotations_of_a_guest_side_module_are_never_evaluated_by_python_3_9() -> None:
    lacking = [str(path) for path in guest_side() if not _postpones_annotations(path)]
    assert lacking == []


@pytest.mark.parametrize("minor", [9, 10], ids=lambda minor: f"python3.{minor}")
def test_a_command_says_which_python_it_needs_to_one_that_only_the_sdk_works_with(minor: int) -> None:
    command = [interpreter(minor), "-B", "-m", "remora", "--help"]
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("remora: commands need Python 3.11 or newer, this is 3.")
    assert done.stderr.count("\n") == 1


def _postpones_annotations(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    empty = all(isinstance(node, (ast.Expr, ast.ImportFrom)) for node in body)
    future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body)
    return empty or future


def _import_cost_us(statement: str, cache: Path) -> int:
    """Return the least of several runs: noise only ever adds."""
    env = {"PATH": os.environ["PATH"], "PYTHONPYCACHEPREFIX": str(cache), "PYTHONPATH": str(PACKAGE.parent)}
    costs = []
    for _ in range(RUNS + 1):  # the first one compiles
        done = subprocess.run(
            [sys.executable, "-S", "-X", "importtime", "-c", statement],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines()[1:]]
        # Self times of what comes after the interpreter's own start.
        start = max(index for index, line in enumerate(lines) if line[2].strip() in {"site", "encodings.utf_8", "io"})
        costs.append(sum(int(line[0]) for line in lines[start + 1 :]))
    return min(costs[1:])


def test_importing_remora_costs_less_than_the_standard_librarys_socket_struct_and_json(tmp_path: Path) -> None:
    yardstick_us = _import_cost_us("import socket, struct, json", tmp_path)
    lazy_us = _import_cost_us("import remora", tmp_path)
    ready_us = _import_cost_us("from remora import connect", tmp_path)
    print(f"socket, struct, json {yardstick_us} us; remora {lazy_us} us; remora.connect {ready_us} us")
    assert lazy_us <= 0.5 * yardstick_us
    # What the first connection loads; the bound for `import remora` alone is twice the yardstick.
    assert ready_us <= 2 * yardstick_us


HEAVY = "typing asyncio dataclasses logging subprocess inspect re numpy hashlib"


def _loaded_by(statement: str, among: str) -> str:
    program = f"import sys; {statement}; print(*(name for name in {among.split()} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def test_importing_remora_loads_nothing_heavy() -> None:
    assert _loaded_by("import remora", f"{HEAVY} socket threading") == ""


def test_the_first_connection_loads_neither_typing_nor_asyncio_nor_numpy() -> None:
    assert _loaded_by("from remora import connect, ready, Tensor", HEAVY) == ""


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        remora.nothing_of_that_name  # noqa: B018
    assert {"connect", "Tensor", "RemoraError"} <= set(dir(remora))

"""Fuzzing what strangers' bytes reach: `python tests/fuzz TARGET... --runs N` or `--seconds S`.

Each target is a module of `targets/` with `case(data)`, which takes any bytes and raises only if something is wrong,
and `seeds()`, valid input to begin with. With atheris (`pip install atheris`; no dependency of ours) coverage guides
the mutation, else it is blind. A case that fails is written to build/fuzz/ and named: put it into the target's `seeds`
with its fix. `--minimise DIRECTORY` (what atheris found is in build/fuzz/found) keeps in `corpus/` what takes a path of
its own; `test_corpus.py` runs that.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

import corpus
from bounds import CASE_CPU_S, Bounds
from mutation import mutate
from targets import NAMES

BUILD = Path(__file__).parents[2] / "build" / "fuzz"
_INSTRUMENTED = ["remora", "h2", "hpack", "hyperframe"]
_RSS_MIB = 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--runs", type=int, default=0, help="cases for each target")
    parser.add_argument("--seconds", type=int, default=0, help="time for each target; default 60 if no --runs")
    parser.add_argument("--engine", choices=("atheris", "blind"), help="default: atheris if it is installed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-bytes", type=int, default=2048, help="longest case")
    parser.add_argument("--minimise", type=Path, metavar="DIRECTORY", help="also from there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = sorted(set(asked.target) - set(NAMES))
    if unknown:
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(NAMES)}")
    asked.target = asked.target or list(NAMES)
    if not asked.runs and not asked.seconds:
        asked.seconds = 60
    if asked.engine is None:
        asked.engine = "atheris" if importlib.util.find_spec("atheris") else "blind"
    return asked


def _load(name: str) -> Any:
    # Any: a module with `case` and `seeds`.
    return importlib.import_module(f"targets.{name}")


def _starters(name: str, target: Any) -> list[bytes]:
    return [*corpus.read(name), *target.seeds()]


def _failed(name: str, data: bytes) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"failed-{name}-{abs(hash(data)) % 10**8:08d}"
    path.write_bytes(data)
    return path


def _blind(name: str, asked: argparse.Namespace) -> None:
    target, random, done = _load(name), Random(asked.seed), 0
    cases = _starters(name, target)
    until_s = time.monotonic() + (asked.seconds or 10**9)
    with Bounds() as bounds:
        while (not asked.runs or done < asked.runs) and time.monotonic() < until_s:
            data = mutate(random, cases, asked.max_bytes)
            try:
                bounds.run(target.case, data)
            except BaseException:
                print(f"{name}: failed, the case is {_failed(name, data)}", flush=True)
                raise
            done += 1
    print(f"stat::number_of_executed_units: {done}", flush=True)


def _guided(name: str, asked: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED):
        target = _load(name)
    found = BUILD / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(_starters(name, target)):
        (found / f"start-{index:04d}").write_bytes(data)
    options = [
        *(f"-seed={asked.seed}", f"-max_len={asked.max_bytes}", f"-timeout={int(CASE_CPU_S) * 5}"),
        *(f"-rss_limit_mb={_RSS_MIB}", f"-artifact_prefix={BUILD}/failed-{name}-", "-print_final_stats=1"),
        *([f"-runs={asked.runs}"] if asked.runs else []),
        *([f"-max_total_time={asked.seconds}"] if asked.seconds else []),
    ]
    bounds = Bounds().__enter__()
    atheris.Setup([sys.argv[0], *options, str(found)], lambda data: bounds.run(target.case, data))
    atheris.Fuzz()  # ends the process


def _minimise(name: str, directory: Path) -> None:
    target = _load(name)
    here = directory / name
    more = [path.read_bytes() for path in here.glob("*")] if here.is_dir() else []
    chosen = set(corpus.minimal(target.case, [*_starters(name, target), *more]))
    corpus.replace(name, chosen)
    print(f"{name}: {len(chosen)} of {len(more)} cases, {sum(map(len, chosen))} bytes", flush=True)


def _run(name: str, asked: argparse.Namespace) -> int:
    """Fuzz one target in a process of its own; return the cases that it ran, -1 if one failed."""
    started_s = time.monotonic()
    command = [
        *(sys.executable, str(Path(__file__).parent), name, "--inside", "--engine", asked.engine),
        *("--runs", str(asked.runs), "--seconds", str(asked.seconds), "--seed", str(asked.seed)),
        *("--max-bytes", str(asked.max_bytes)),
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{name}.log"
    # The fuzzer ends its process at once, so what that has made is removed here.
    with log.open("wb") as output, TemporaryDirectory(prefix="remora-fuzz-") as scratch:
        environment = {**os.environ, "TMPDIR": scratch}
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    status = done.returncode
    text = log.read_text(errors="replace")
    found = re.findall(r"stat::number_of_executed_units: (\d+)", text)
    if status or not found:
        print(f"{name}: FAILED, see {log}\n{text[-1500:]}", flush=True)
        return -1
    print(f"{name}: {int(found[-1])} cases in {time.monotonic() - started_s:.0f} s ({asked.engine})", flush=True)
    return int(found[-1])


def main() -> int:
    asked = _arguments()
    if asked.minimise is not None:
        for name in asked.target:
            _minimise(name, asked.minimise)
        return 0
    if asked.inside:
        (_guided if asked.engine == "atheris" else _blind)(asked.target[0], asked)
        return 0
    counts = [_run(name, asked) for name in asked.target]
    print(f"{sum(count for count in counts if count > 0)} cases in all", flush=True)
    return int(any(count < 0 for count in counts))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)

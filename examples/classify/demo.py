"""`make demo`: microVMs classify real photographs on the host's accelerator.

It builds what is missing, starts an agent of its own, boots one microVM of the example function, makes a template,
clones it, and has all clones classify the same labelled photographs at the same time. Then it writes
build/demo/report.json and report.html, and shows that nothing is left behind. Ctrl-C leaves nothing behind either.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fleet import Worker, all_at_once
from report import MicroVm, Photo, Report
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from remora import paths
from remora.bench.host import describe_host
from remora.bench.rig import agent
from remora.catalog.build import build as build_model
from remora.catalog.local import LocalModel
from remora.catalog.photos import fetch_photos
from remora.errors import RemoraError
from remora.images.build import build_image
from remora.images.store import ImageStore
from remora.sandboxes.guest_files import guest_files
from remora.sandboxes.leftovers import find_leftovers
from remora.sandboxes.options import Options
from remora.sandboxes.sandbox import Sandbox
from remora.sandboxes.spawner import close_shared
from remora.sandboxes.templates import Templates

MODEL = "efficientnet-lite0"
HERE = Path(__file__).resolve().parent
_MEMORY_MIB = 192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=int(os.environ.get("DEMO_VMS", "4")), metavar="N", help="clones")
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "build/demo", metavar="DIRECTORY")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    args = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        if not 1 <= args.vms <= 64:
            parser.error("--vms takes a number from 1 to 64")
        report = demonstrate(console, args.vms)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; everything was taken down[/]")
        return 130
    except RemoraError as error:
        if args.debug:
            raise
        Console(stderr=True).print(f"[red]demo:[/] {error}", highlight=False)
        return error.exit_status
    as_json, as_html = report.write(args.output)
    _print_summary(console, report.as_json())
    console.print(f"[bold]report:[/] {_shown(as_html)} and {_shown(as_json)}", highlight=False)
    return _verdict(console, report)


def demonstrate(console: Console, count: int) -> Report:
    """Run the whole demo and return its report; nothing of it runs any more then."""
    photos, image = _prepare(console)
    with ExitStack() as stack:
        stack.callback(close_shared)
        rig = stack.enter_context(agent())
        os.environ["REMORA_RUNTIME_DIR"] = str(rig.runtime)
        native, native_ms = _classify_natively(photos)
        report = _run_fleet(console, count, photos, image, native, native_ms)
        directory = rig.directory
    report.leftovers = find_leftovers(directory)
    return report


def _run_fleet(
    console: Console,
    count: int,
    photos: list[Photo],
    image: str,
    native: dict[str, Any],
    native_ms: list[float],
) -> Report:
    templates = Templates(paths.state_dir())
    template = f"demo-{os.getpid()}"
    options = Options(image=image, memory_mib=_MEMORY_MIB, command=())
    cold = Worker(MicroVm("cold boot", "cold"))
    clones = [Worker(MicroVm(f"clone {number}", "clone")) for number in range(1, count + 1)]
    clock_s = time.perf_counter()
    with ExitStack() as stack, _table([cold, *clones], len(photos), console) as refresh:
        stack.callback(cold.close)
        cold.start(lambda: Sandbox.boot(options), photos[0], clock_s)
        assert cold.sandbox is not None
        seen = cold.sandbox.devices()
        cold.vm.devices = list(seen.devices)
        kvm = cold.sandbox.fields.get("kvm", False)
        cold_start_ms = max(cold.sandbox.timings.values(), default=0.0)
        all_at_once([cold], photos[1:], clock_s, refresh)
        cold.close()

        begin_s = time.perf_counter()
        stack.callback(_remove_template, templates, template)
        templates.create(template, options)
        template_ms = (time.perf_counter() - begin_s) * 1000
        for clone in clones:  # one after the other, so that each start is measured alone, as the cold boot was
            stack.callback(clone.close)
            clone.start(lambda: Sandbox.clone(template), photos[0], clock_s)
            refresh()
        for clone in clones:
            assert clone.sandbox is not None
            clone.vm.devices = list(clone.sandbox.devices().devices)
        all_at_once(clones, photos[1:], clock_s, refresh)
        refresh()
    return Report(
        model=MODEL,
        kvm=bool(kvm),
        photos=photos,
        native=native,
        native_ms=native_ms,
        cold=cold.vm,
        cold_start_ms=cold_start_ms,
        template_ms=template_ms,
        clones=[clone.vm for clone in clones],
        host=describe_host(),
    )


def _remove_template(templates: Templates, name: str) -> None:
    if any(listed.name == name for listed in templates.list()):
        templates.remove(name)


def _prepare(console: Console) -> tuple[list[Photo], str]:
    """Build or fetch whatever is missing, with a progress bar each."""
    with _progress(console) as report:
        entry = build_model(MODEL, report=report("model", "efficientnet-lite0"))
        labels = entry.source.manifest["labels"]
        found = fetch_photos(report=report("photographs", "20 labelled photographs"))
        guest = report("guest", "guest OS image")
        guest_files(paths.state_dir(), lambda step, fraction: guest(step, fraction, 1))
        image = build_image(ImageStore(), HERE, progress=report("image", "function image"))
    photos = [Photo(photo.name, photo.path, photo.class_index, labels[photo.class_index]) for photo in found]
    return photos, image.name


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, str], Callable[..., None]]]:
    """Yield a function that adds a line and returns what to call with each step."""
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(bar_width=24))
    with Progress(*columns, TextColumn("{task.fields[step]}"), TimeElapsedColumn(), console=console) as progress:
        tasks: list[TaskID] = []

        def add(_name: str, title: str) -> Callable[..., None]:
            if tasks:
                progress.update(tasks[-1], total=1, completed=1, step="")
            task = progress.add_task(title, total=None, step="")
            tasks.append(task)

            def step(text: str, done: float = 0, total: float = 0) -> None:
                progress.update(task, step=text, total=total or None, completed=done)

            return step

        yield add
        progress.update(tasks[-1], total=1, completed=1, step="")


def _classify_natively(photos: list[Photo]) -> tuple[dict[str, Any], list[float]]:
    """The same model and code in this process: what the answers from the microVMs are compared with."""
    model = LocalModel.from_catalog(MODEL)
    pictures = {photo.name: photo.path.read_bytes() for photo in photos}
    model.classify(pictures[photos[0].name])  # the first run allocates
    answers, times_ms = {}, []
    for name, picture in pictures.items():
        begin_s = time.perf_counter()
        labels = model.classify(picture, top=5)
        times_ms.append((time.perf_counter() - begin_s) * 1000)
        answers[name] = tuple((label.index, label.name, label.score) for label in labels)
    return answers, times_ms


@contextmanager
def _table(workers: list[Worker], total: int, console: Console) -> Iterator[Callable[[], None]]:
    """Show the live table on a terminal; elsewhere only its end."""

    def draw() -> Table:
        table = Table("microVM", "state", "pictures", "correct", "a request", "first answer")
        for worker in workers:
            median_ms = worker.median_ms
            table.add_row(
                worker.vm.name,
                worker.state,
                f"{len(worker.vm.answers)}/{total}",
                str(worker.correct),
                "" if median_ms is None else f"{median_ms:.1f} ms",
                f"{worker.vm.first_answer_ms:.0f} ms" if worker.vm.first_answer_ms else "",
            )
        return table

    if not console.is_terminal:
        yield lambda: None
        console.print(draw())
        return
    with Live(get_renderable=draw, console=console, refresh_per_second=8) as live:
        yield live.refresh


def _print_summary(console: Console, data: dict[str, Any]) -> None:
    clones = ", ".join(f"{value:.0f}" for value in data["clone_to_first_answer_ms"])
    table = Table(show_header=False, box=None)
    table.add_row(
        "accuracy", f"top 1 {data['top1_correct']}, native {data['native_top1_correct']}, of {data['photos']}"
    )
    table.add_row("labels as native", str(data["labels_equal_native"]))
    table.add_row(
        "cold boot to first answer", f"{data['cold_boot_ms']:.0f} ms" + ("" if data["kvm"] else " (emulated)")
    )
    table.add_row("clone to first answer", f"{clones} ms")
    table.add_row("a request, all at once", f"{data['request_ms_p50']} ms")
    table.add_row("a request, one microVM", f"{data['request_alone_ms_p50']} ms")
    table.add_row("native", f"{data['native_ms_p50']} ms")
    table.add_row("devices in a guest", "\n".join(data["guest_devices"]))
    table.add_row("left behind", "\n".join(data["leftovers"]) or "nothing")
    console.print(table)


def _verdict(console: Console, report: Report) -> int:
    """Return 0 if everything that the demo claims was true in this run."""
    data = report.as_json()
    problems = []
    if any(count != data["photos"] for count in data["answered"]):
        problems.append("not every photograph was answered")
    if not all(data["labels_equal_native"]):
        problems.append("labels differ from the native run")
    if data["leftovers"]:
        problems.append("something was left behind")
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return 1 if problems else 0


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())

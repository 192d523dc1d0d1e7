"""Templates and their clones."""

from __future__ import annotations

import secrets
import threading
import time

import pytest

from microvms import Remora
from remora import paths
from remora.errors import AlreadyExistsError, FailedPreconditionError, RemoraError
from remora.sandboxes import spawner
from remora.sandboxes.options import Options
from remora.sandboxes.sandbox import Sandbox
from remora.sandboxes.templates import Templates

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120), pytest.mark.usefixtures("clean")]

ALONE = Options(accelerator=False)


def test_clones_that_start_together_differ_in_everything_that_must_differ(remora: Remora, template: str) -> None:
    answers: list[list[str]] = []
    failures: list[BaseException] = []

    def clone(number: int) -> None:
        try:
            with Sandbox.clone(template, ALONE._replace(hostname=f"clone{number}")) as sandbox:
                assert sandbox.process.stdout is not None
                with sandbox.process.stdout.makefile("rb") as lines:
                    answers.append(lines.readline().decode().split())
        except RemoraError as error:
            failures.append(error)

    try:
        threads = [threading.Thread(target=clone, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        spawner.close_shared()
    assert failures == []
    hostnames, randoms, entropies, times = zip(*answers, strict=True)
    assert sorted(hostnames) == ["clone0", "clone1", "clone2"]
    assert len(set(randoms)) == 3
    assert len(set(entropies)) == 3
    assert all(abs(float(seen) - time.time()) < 60 for seen in times)


def test_a_clone_is_many_times_faster_than_a_boot(remora: Remora, template: str) -> None:
    def first_answer_s(make: object) -> float:
        began_s = time.monotonic()
        with make() as sandbox:  # type: ignore[operator]
            assert sandbox.process.stdout is not None
            with sandbox.process.stdout.makefile("rb") as lines:
                while lines.readline() == b"loading\n":
                    pass
        return time.monotonic() - began_s

    try:
        spawner.shared()
        booted_s = first_answer_s(lambda: Sandbox.boot(ALONE._replace(image=remora.image)))
        cloned_s = min(first_answer_s(lambda: Sandbox.clone(template, ALONE)) for _ in range(3))
    finally:
        spawner.close_shared()
    # The figure is 8 on an idle machine; a busy one gets half of that.
    assert booted_s > 4 * cloned_s, f"boot {booted_s:.2f} s, clone {cloned_s:.2f} s"


def test_a_clones_streams_are_the_functions(remora: Remora, template: str) -> None:
    done = remora("run", "--no-accel", "--template", template, "--name", "echo", stdin=b"one\ntwo\n")
    assert done.returncode == 0, done.stderr.decode()
    first, *rest = done.stdout.decode().splitlines()
    assert first.startswith("echo ")
    assert rest == ["got one", "got two"]


def test_a_template_is_listed_and_not_removed_while_a_clone_runs(remora: Remora, template: str) -> None:
    assert template in [listed["name"] for listed in remora.json("template", "list", "--json")]
    with remora.start("run", "--no-accel", "--template", template) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        done = remora("template", "remove", template)
        assert done.returncode == 7
        assert b"clones of the template" in done.stderr
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(30) == 0


def test_a_taken_name_is_refused_before_anything_boots(remora: Remora, template: str) -> None:
    with pytest.raises(AlreadyExistsError, match="remora template remove"):
        Templates(paths.state_dir()).create(template, ALONE._replace(image=remora.image))


def test_a_function_that_ends_before_it_is_ready_is_quoted(remora: Remora) -> None:
    name = f"test-{secrets.token_hex(4)}"
    done = remora(
        *("template", "create", "--no-accel", "--quiet", name, remora.image, "sh", "-c", "echo no model >&2; exit 4")
    )
    assert done.returncode == 7
    assert b"status 4" in done.stderr
    assert b"no model" in done.stderr
    assert name not in [listed["name"] for listed in remora.json("template", "list", "--json")]


def test_a_template_of_another_qemu_is_refused_with_the_fix(
    remora: Remora, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remora.sandboxes.templates.vmm_version", lambda _name, _state_dir: "99.0.0")
    with pytest.raises(FailedPreconditionError, match=r"this host has 99\.0\.0") as caught:
        Sandbox.clone(template, ALONE)
    assert caught.value.fix is not None
    assert f"remora template remove {template}" in caught.value.fix

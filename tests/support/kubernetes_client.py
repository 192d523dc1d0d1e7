"""A cluster as `kubectl` shows it, wherever it runs: what the tests' own clusters and given ones have in common."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

READY_S = 180.0


class KubernetesClient:
    """Asks one cluster.

    Args:
        kubectl: the program.
        kubeconfig: who asks whom, as KUBECONFIG says it.
        namespace: what commands are about that name none; else the context's.
    """

    def __init__(self, kubectl: Path, kubeconfig: str, namespace: str = "") -> None:
        self._kubectl = kubectl
        self._namespace = [f"--namespace={namespace}"] if namespace else []
        self.kubeconfig = kubeconfig
        self.environment = {**os.environ, "KUBECONFIG": kubeconfig}

    def argv(self, *arguments: str) -> list[str]:
        return [str(self._kubectl), *self._namespace, *arguments]

    def kubectl(self, *arguments: str, stdin: str = "", timeout_s: float = 180.0) -> str:
        done = subprocess.run(
            self.argv(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [*objects]}))

    def ready_pods(self, selector: str, namespace: str = "") -> list[dict[str, Any]]:
        within = ["-n", namespace] if namespace else []
        items = self.get("pods", *within, "-l", selector)["items"]
        return [pod for pod in items if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]

    def pods_are(self, selector: str, count: int, timeout_s: float = 240.0) -> list[dict[str, Any]]:
        """Wait until there are so many ready pods and no others; return them."""

        def settled() -> tuple[list[dict[str, Any]]] | None:
            ready = self.ready_pods(selector)
            return (ready,) if len(self.get("pods", "-l", selector)["items"]) == count == len(ready) else None

        # Those that were seen: a kubelet that has just been started may say of one that it is not ready after all.
        (found,) = self.wait(f"{count} ready pods and no others", settled, timeout_s)
        return list(found)

    def wait(self, what: str, done: Callable[[], Any], timeout_s: float = READY_S) -> Any:
        """Ask `done` until it answers something true."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if answer := done():
                    return answer
            except RuntimeError as error:
                said = str(error)  # the API server is not there yet, or the object is not
            else:
                said = ""
            assert time.monotonic() < deadline_s, f"not in {timeout_s:g} s: {what} {said}\n{self.tails()}"
            time.sleep(0.2)

    def tails(self) -> str:
        """Return the last lines of whatever explains a failure."""
        return self.kubectl("get", "pods,events", "-o", "wide")


def is_ready(thing: Mapping[str, Any]) -> bool:
    conditions: Sequence[Mapping[str, str]] = thing.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

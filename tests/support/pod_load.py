"""`constant_load` from a pod of the cluster: a given cluster's addresses cannot be reached from where the tests run.

It comes and goes by `kubectl exec`, so it needs nothing of the cluster but an image with Python: the service's own.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import constant_load
from constant_load import Tally
from kubernetes_client import KubernetesClient


def load_pod(name: str, namespace: str, image: str) -> dict[str, Any]:
    """Return the pod that the load comes from: an ordinary one, of no microVM."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sleep", "1000000"],
                    "resources": {"limits": {"memory": "128Mi"}, "requests": {"cpu": "50m"}},
                }
            ],
        },
    }


class PodLoad:
    """`with PodLoad(cluster, "load", ("classify", 80), pictures, clients=3) as load:`

    Args:
        pod: one of `load_pod`, which runs.
        address: of the service, as a pod knows it.
        pictures: with the labels that they should get; those that the model gets wrong are left out.
    """

    def __init__(
        self,
        cluster: KubernetesClient,
        pod: str,
        address: tuple[str, int],
        pictures: Sequence[tuple[bytes, int]],
        *,
        clients: int,
        timeout_s: float = 60.0,
    ) -> None:
        program = Path(constant_load.__file__).read_text()
        self._process = subprocess.Popen(
            cluster.argv("exec", "-i", pod, "--", "python3", "-u", "-c", program),
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.total = Tally()
        order = {
            "address": address,
            "clients": clients,
            "timeout_s": timeout_s,
            "pictures": [(base64.b64encode(picture).decode(), label) for picture, label in pictures],
        }
        try:
            #: How many pictures are asked for.
            self.known = int(self._say(order))
        except BaseException:
            self._end()
            raise

    def _say(self, order: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the load ended with {self._process.wait()}"
        return json.loads(answer)

    def lap(self) -> Tally:
        """Return what happened since the last lap, and begin the next."""
        fields: Mapping[str, Any] = self._say("lap")
        tally = Tally(**{**fields, "turned_away": Counter(fields["turned_away"])})
        self.total.add(tally)
        return tally

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(constant_load.ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if self._process.poll() is None:
                self.lap()
        finally:
            self._end()

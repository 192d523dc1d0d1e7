"""The policy file: a mistake in it is told, and what was accepted gives terms for any caller."""

from __future__ import annotations

from collections.abc import Iterator

from remora.agent.policy import parse
from remora.errors import RemoraError


def case(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        policy = parse(text)
    except RemoraError as error:
        str(error)
        return
    for tenant, labels in (("uid:0", {}), ("tenant:team", {"app": "x", "tier": "gold"}), ("sandbox:a", {"app": ""})):
        terms = policy.rules.terms(tenant, labels)
        for key in terms.values:
            terms.rule(key)
        for check, value in (("models", "identity"), ("operations", "infer"), ("devices", "cpu")):
            try:
                terms.check(check, value)
            except RemoraError as error:
                str(error)


def seeds() -> Iterator[bytes]:
    yield b"[limits]\nconnections = 100\njson_bytes = 4096\n[store]\ntenant_bytes = 1000\n[workers]\nstandby = 0\n"
    yield b'[defaults]\nmodels = ["identity", "efficientnet-*"]\noperations = ["infer"]\nshare = 2.5\nexec = false\n'
    yield b'[tenant."tenant:team"]\nrequests_per_s = 5\nburst_s = 2\n[[label]]\nmatch = {app = "x"}\nstored_bytes = 9\n'
    yield b"limits.connections" + b".a" * 900 + b" = 1\n"
    yield b"x = " + b"[" * 900 + b"]" * 900
    yield b"[defaults]\nmodels = " + b"[" * 300 + b"]" * 300
    yield b"[limits]\nconnections = " + b"9" * 5000
    yield b"[limits]\nconnections = 0x" + b"f" * 5000 + b"\n[defaults]\nweight = 0x" + b"f" * 5000
    yield b"[defaults]\nweight = 0x" + b"f" * 5000

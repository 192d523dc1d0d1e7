"""What an operator should know of a request that was refused or failed: the rule, its value, and what to change.

Errors are written for callers, and name a limit or rule in brackets at their end. Only names that exist count: text of
a guest's own that looks like one must not become a label, or send an operator looking for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from remora.agent.policy import Policy
from remora.agent.rules import KEYS
from remora.errors import RemoraError
from remora.wire.ttrpc.frames import MessageTooLargeError

_LIMIT = re.compile(r"\(((limits|store|workers)\.([a-z_]+))\)")
_RULE_MARK = "(rule ["
_RULE = re.compile(
    r"\(rule (\[(?:defaults|\[label\]|grant\.[a-z]{1,16}|tenant\.\"[^\"\]]{1,200}\")\](?: \d+)?) ([a-z_]+) = "
)
_CODES = {
    1: "CANCELLED",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}
#: What an operator can do about errors that no limit causes; callers' own mistakes are not here.
_CHANGES = {
    4: "if it recurs: more workers.threads, another device, or less load; `remora top` shows the queues",
    10: "the worker died: see `worker died` before this line, and workers.*_memory_bytes",
    13: "a fault of the agent or its worker: see the cause; please report it",
    14: "nothing if the agent drains, or the client was too slow; else see `remora agent status`",
    15: "a stored file was damaged: check the disk; the client uploads it again",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """`rule` is a limit's name, a rule's table and key, or else the name of the error's code."""

    code: str
    rule: str
    #: What the rule is set to now; empty without one.
    value: str = ""
    change: str = ""


def code_name(error: RemoraError) -> str:
    return _CODES.get(error.code, "UNKNOWN")


def explain(error: RemoraError, policy: Policy, file: str = "") -> Refusal:
    """Return what an operator should know; `file` is the configuration in effect, empty for none."""
    code = code_name(error)
    where = file or "a file for --config"
    rule = _of_rule(code, error.message)
    if rule is not None:
        return rule
    if isinstance(error, MessageTooLargeError):
        return _of_limit(code, policy, where, "limits", "message_bytes") or Refusal(code, code)
    for found in reversed(list(_LIMIT.finditer(error.message))):
        refusal = _of_limit(code, policy, where, found[2], found[3])
        if refusal is not None:
            return refusal
    return Refusal(code, code, change=_CHANGES.get(error.code, ""))


def _of_rule(code: str, message: str) -> Refusal | None:
    """Return the rule that a message ends with. One pass: a guest's text may be long, and full of brackets."""
    found = _RULE.match(message, max(0, message.rfind(_RULE_MARK)))
    if found is None or found[2] not in KEYS:
        return None
    value, _, file = message[found.end() : message.rfind(")")].rpartition(" in ")
    if not file:
        return None
    if found[1].startswith("[grant."):
        kind = found[1].removeprefix("[grant.").removesuffix("]")
        return Refusal(code, f"{found[1]} {found[2]}", value, f"give the pod more shares of remora.dev/{kind}")
    change = f"change {found[2]} of {found[1]} in {file} and send SIGHUP, if the tenant may have more"
    return Refusal(code, f"{found[1]} {found[2]}", value, change)


def of_limit(name: str, policy: Policy, file: str = "") -> Refusal:
    """Return the same for a limit that has no error, such as one that closed a connection."""
    section, _, key = name.partition(".")
    return _of_limit("", policy, file or "a file for --config", section, key) or Refusal("", name)


def _of_limit(code: str, policy: Policy, where: str, section: str, key: str) -> Refusal | None:
    table = getattr(policy, section)
    if key not in {entry.name for entry in fields(table)}:
        return None
    change = f"raise {key} under [{section}] in {where} and start the agent again, if the node has room"
    return Refusal(code, f"{section}.{key}", str(getattr(table, key)), change)

"""Every case that fuzzing was started from or found worth keeping: none may crash, hang or grow.

`python tests/fuzz` looks for new ones.
"""

from __future__ import annotations

import importlib
from random import Random

import pytest

import corpus
from bounds import Bounds
from mutation import mutate
from targets import NAMES

#: New cases for each target, different ones only when the corpus changes: a failure here can be repeated.
_MUTATIONS = 300


@pytest.mark.parametrize("name", NAMES)
def test_kept_cases_and_their_neighbours_do_no_harm(name: str) -> None:
    target = importlib.import_module(f"targets.{name}")
    cases = [*corpus.read(name), *target.seeds()]
    random = Random(7)
    with Bounds() as bounds:
        for data in [*cases, *(mutate(random, cases, 4096) for _ in range(_MUTATIONS))]:
            bounds.run(target.case, data)

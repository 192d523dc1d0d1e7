"""Who has which shares: a grant is the first pod's that presents it, and goes when its shares go to another."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from remora.agent import policy
from remora.agent.grants import MAX_GRANTS, Grants, check
from remora.agent.journal import Journal
from remora.agent.quotas import Quotas
from remora.agent.refusals import explain
from remora.agent.rules import Granted, kind_of
from remora.errors import AlreadyExistsError, InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError


class Books:
    """Grants with a journal, which can be opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.changes = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(self._path, lambda callback: callback(), lambda error: None)
        self.grants = Grants(self.journal, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def again(self) -> None:
        """As after a restart of the agent."""
        self.journal.close()
        self.open()

    def state(self, *shares: str, kind: str = "gpu", per_device: int = 10) -> str:
        """State a grant; return its id."""
        grant_id = secrets.token_hex(16)
        self.grants.state(check(grant_id, kind, shares, per_device), lambda _error: None)
        return grant_id

    def of(self, holder: str) -> dict[str, tuple[int, int]]:
        found = self.grants.of(holder)
        return {kind: (granted.shares, granted.shares_per_device) for kind, granted in found.items()}


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    books = Books(tmp_path / "journal.sqlite")
    yield books
    books.journal.close()


def test_a_pod_has_what_it_presents_of_each_kind(books: Books) -> None:
    gpu, cpu = books.state("gpu0-0", "gpu0-1"), books.state("cpu0-0", kind="cpu", per_device=4)
    assert books.grants.present("a", [gpu, cpu]) == []
    assert books.of("a") == {"gpu": (2, 10), "cpu": (1, 4)}
    assert books.changes == 2


def test_an_id_that_was_never_stated_grants_nothing(books: Books) -> None:
    for forged in ("0" * 32, "", "gpu0-0", "' OR 1=1"):
        assert books.grants.present("thief", [forged]) == ["no such grant was stated to this agent"]
    assert books.of("thief") == {}


def test_a_grant_is_of_the_first_who_presents_it(books: Books) -> None:
    grant = books.state("gpu0-0")
    assert books.grants.present("a", [grant]) == []
    assert books.grants.present("thief", [grant]) == ["it is the grant of another pod, a"]
    assert (books.of("a"), books.of("thief")) == ({"gpu": (1, 10)}, {})


def test_the_same_pod_may_present_it_again(books: Books) -> None:
    """A sandbox that is made again, an agent that comes back, another container."""
    grant = books.state("gpu0-0")
    for _ in range(3):
        assert books.grants.present("a", [grant]) == []
    assert books.of("a") == {"gpu": (1, 10)}


def test_containers_of_a_pod_add_up_and_what_they_share_counts_once(books: Books) -> None:
    init, main = books.state("gpu0-0", "gpu0-1"), books.state("gpu0-0", "gpu0-1", "gpu0-2")
    books.grants.present("a", [init])
    assert books.of("a") == {"gpu": (2, 10)}
    books.grants.present("a", [main])
    assert books.of("a") == {"gpu": (3, 10)}


def test_shares_that_go_to_another_pod_are_taken_from_the_first(books: Books) -> None:
    old = [books.state("gpu0-0"), books.state("gpu0-1")]
    books.grants.present("old", old)
    never = books.state("gpu0-0", "gpu0-5")
    books.grants.present("new", [books.state("gpu0-0")])
    assert books.of("new") == {"gpu": (1, 10)}
    assert books.of("old") == {"gpu": (1, 10)}
    assert books.grants.present("old", old[:1]) == ["no such grant was stated to this agent"]
    assert books.grants.present("late", [never]) == ["no such grant was stated to this agent"]


def test_an_init_containers_grant_stays_until_its_pod_presents_it(books: Books) -> None:
    """The kubelet allocates for all containers of a pod before the first of them starts."""
    init, main = books.state("gpu0-0"), books.state("gpu0-0")
    assert books.grants.present("a", [init]) == []
    assert books.grants.present("a", [main]) == []
    assert books.of("a") == {"gpu": (1, 10)}


def test_equal_names_of_another_kind_are_other_shares(books: Books) -> None:
    books.grants.present("a", [books.state("0-0", kind="gpu")])
    books.grants.present("b", [books.state("0-0", kind="cpu")])
    assert books.of("a") == {"gpu": (1, 10)}


def test_everything_is_known_after_a_restart(books: Books) -> None:
    first, waiting, gone = books.state("gpu0-0"), books.state("gpu0-1"), books.state("gpu0-2")
    books.grants.present("a", [first])
    books.grants.present("b", [gone])
    books.grants.present("c", [books.state("gpu0-2")])
    books.again()
    assert (books.of("a"), books.of("b"), books.of("c")) == ({"gpu": (1, 10)}, {}, {"gpu": (1, 10)})
    assert books.grants.present("thief", [first]) == ["it is the grant of another pod, a"]
    assert books.grants.present("d", [waiting]) == []
    assert books.grants.present("b", [gone]) == ["no such grant was stated to this agent"]


def test_grants_of_pods_that_never_start_do_not_pile_up(books: Books) -> None:
    held = books.state("gpu0-0")
    books.grants.present("a", [held])
    for number in range(MAX_GRANTS + 5):
        books.state(f"gpu1-{number}")
    assert len(books.grants) == MAX_GRANTS
    assert books.of("a") == {"gpu": (1, 10)}


def test_an_id_cannot_be_stated_twice(books: Books) -> None:
    grant = books.state("gpu0-0")
    with pytest.raises(AlreadyExistsError):
        books.grants.state(check(grant, "gpu", ["gpu0-1"], 10), lambda _error: None)


@pytest.mark.parametrize(
    ("grant_id", "kind", "shares", "per_device"),
    [
        ("short", "gpu", ["gpu0-0"], 10),
        ("0" * 32, "tpu", ["gpu0-0"], 10),
        ("0" * 32, "gpu", [], 10),
        ("0" * 32, "gpu", ["gpu0-0"], 0),
        ("0" * 32, "gpu", ["gpu0-0", "gpu0-0"], 10),
        ("0" * 32, "gpu", ["../x"], 10),
        ("0" * 32, "gpu", ["gpu0-0"] * 10001, 10),
    ],
)
def test_what_is_no_grant_cannot_be_stated(grant_id: str, kind: str, shares: list[str], per_device: int) -> None:
    with pytest.raises(InvalidArgumentError):
        check(grant_id, kind, shares, per_device)


# -- what a grant is worth --------------------------------------------------------------------------------------------

THREE = {"pod-1": {"gpu": Granted("gpu", 3, 10)}}


class Clock:
    now_s = 100.0


def quotas(text: str = "") -> tuple[Quotas, Clock]:
    clock = Clock()
    made = Quotas(policy.parse(text, "agent.toml").rules, lambda: clock.now_s)
    made.granted = lambda holder: THREE.get(holder, {})
    made.note("sandbox:a", {"uid": "pod-1"})
    made.note("sandbox:b", {})
    return made, clock


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda:0", "gpu"), ("cuda", "gpu")])
def test_devices_count_as_a_kind(device: str, kind: str) -> None:
    assert kind_of(device) == kind


def test_a_grant_is_device_time_and_a_refusal_says_so() -> None:
    made, clock = quotas()
    terms = made.terms("sandbox:a", "sandbox:a")
    made.admit_on("cuda:0", "sandbox:a", terms)
    made.charge("sandbox:a", terms, 600_000, device="cuda:0", key="sandbox:a")
    with pytest.raises(ResourceExhaustedError) as refused:
        made.admit_on("cuda:0", "sandbox:a", terms)
    assert "3 shares of remora.dev/gpu" in refused.value.message
    refusal = explain(refused.value, policy.Policy())
    assert (refusal.rule, refusal.value) == ("[grant.gpu] device_s_per_s", "0.3")
    assert "more shares of remora.dev/gpu" in refusal.change
    made.admit_on("cpu", "sandbox:a", terms)  # a grant of one kind says nothing of the other
    clock.now_s += 1.01  # 0.3 saved up, 0.6 used, 0.3 per second
    made.admit_on("cuda:0", "sandbox:a", terms)


def test_policy_bounds_a_pod_with_a_grant_as_well() -> None:
    made, _clock = quotas("[defaults]\ndevice_s_per_s = 0.1")
    terms = made.terms("sandbox:a", "t")
    made.charge("t", terms, 200_000, device="cuda:0", key="sandbox:a")
    made.admit_on("cuda:0", "sandbox:a", terms)  # of its 0.3 it has 0.1 left
    with pytest.raises(ResourceExhaustedError, match=r"rule \[defaults\] device_s_per_s"):
        made.admit("t", terms)


def test_pods_of_one_tenant_have_grants_of_their_own() -> None:
    made, _clock = quotas()
    made.charge("t", made.terms("sandbox:a", "t"), 10_000_000, device="cuda:0", key="sandbox:a")
    with pytest.raises(ResourceExhaustedError, match=r"grant\.gpu"):
        made.admit_on("cuda:0", "sandbox:a", made.terms("sandbox:a", "t"))
    made.admit_on("cuda:0", "sandbox:b", made.terms("sandbox:b", "t"))


def test_a_share_is_weight_beside_others_where_it_is_a_share() -> None:
    made, _clock = quotas("[defaults]\nweight = 2")
    terms = made.terms("sandbox:a", "sandbox:a")
    assert (terms.share_on("cuda:0").weight, terms.share_on("cpu").weight) == (6.0, 2.0)
    assert made.terms("sandbox:b", "sandbox:b").share_on("cuda:0").weight == 2.0


def test_a_device_may_be_for_pods_with_a_grant_alone() -> None:
    made, _clock = quotas('[defaults]\nrequire_grant = ["cuda:*"]')
    made.terms("sandbox:a", "sandbox:a").check_device("cuda:0")
    others = made.terms("sandbox:b", "sandbox:b")
    others.check_device("cpu")
    with pytest.raises(PermissionDeniedError) as refused:
        others.check_device("cuda:0")
    assert 'rule [defaults] require_grant = ["cuda:*"] in agent.toml' in refused.value.message
    assert "remora.dev/gpu" in str(refused.value)


def test_a_change_of_grants_applies_to_callers_that_are_there() -> None:
    made, _clock = quotas()
    held: dict[str, Granted] = {}
    made.granted = lambda _holder: held
    assert made.terms("sandbox:a", "t").grants == {}
    held["gpu"] = Granted("gpu", 1, 10)
    made.regranted()
    assert made.terms("sandbox:a", "t").grants == held

"""One holder for a lease at a time, whoever asks when; a holder that gives no sign of life loses it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import LocalStore, MemoryStore, ObjectStore

from segpipe.lake.lease import Holder

PATIENCE = 60.0


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path)


@pytest.fixture
def first(objects: ObjectStore) -> Iterator[Holder]:
    with Holder(objects, "first", PATIENCE).alive() as holder:
        yield holder


@pytest.fixture
def second(objects: ObjectStore) -> Iterator[Holder]:
    with Holder(objects, "second", PATIENCE).alive() as holder:
        yield holder


def names(objects: ObjectStore) -> list[str]:
    return sorted(meta["path"] for page in obstore.list(objects) for meta in page)


def test_a_lease_is_one_holders_until_it_is_given_back(first: Holder, second: Holder) -> None:
    assert first.take("scene")
    assert first.take("scene")  # a retry of the same flow run
    assert not second.take("scene")
    first.give_back("scene")
    assert second.take("scene")
    assert not first.take("scene")


def test_nothing_is_left_behind(objects: ObjectStore) -> None:
    with Holder(objects, "only", PATIENCE).alive() as holder:
        assert holder.take("a")
        assert holder.take("b")
        assert names(objects) == ["holders/only", "leases/a/00000001", "leases/b/00000001"]
    assert names(objects) == []


def test_a_holder_of_the_same_name_has_its_leases_after_a_kill(objects: ObjectStore) -> None:
    killed = Holder(objects, "run", PATIENCE)
    obstore.put(objects, "holders/run", b"")
    assert killed.take("scene")  # and then its process is gone, without a word
    with Holder(objects, "other", PATIENCE).alive() as other:
        assert not other.take("scene")
    with Holder(objects, "run", PATIENCE).alive() as again:
        assert again.take("scene")


def test_who_gives_no_sign_of_life_is_taken_over_once(objects: ObjectStore) -> None:
    killed = Holder(objects, "killed", 0.4)
    obstore.put(objects, "holders/killed", b"")
    assert killed.take("scene")
    with Holder(objects, "a", 0.4).alive() as a, Holder(objects, "b", 0.4).alive() as b:
        assert not a.take("scene")
        end = time.monotonic() + 20
        while not a.take("scene"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not b.take("scene")
        killed.give_back("scene")  # it wakes up, and ends: what is a's stays
        assert not b.take("scene")
        a.give_back("scene")
        assert b.take("scene")


def test_signs_of_life_keep_a_lease_for_longer_than_the_patience(objects: ObjectStore) -> None:
    with Holder(objects, "slow", 0.8).alive() as slow, Holder(objects, "keen", 0.8).alive() as keen:
        assert slow.take("scene")
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert not keen.take("scene")
            time.sleep(0.1)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_each_lease_has_one_holder(objects: ObjectStore, stale: bool) -> None:
    leases = [f"scene-{n}" for n in range(20)]
    if stale:  # all were held by a process that is gone
        gone = Holder(objects, "gone", PATIENCE)
        assert all(gone.take(lease) for lease in leases)
    holders = [Holder(objects, f"h{n}", PATIENCE) for n in range(6)]
    for holder in holders:
        obstore.put(objects, f"holders/{holder.name}", b"")

    def take_all(holder: Holder) -> list[str]:
        return [lease for lease in leases if holder.take(lease)]

    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(take_all, holders))
    assert sorted(lease for mine in taken for lease in mine) == sorted(leases)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.booleans()), max_size=30))
def test_any_order_of_taking_and_giving_back(steps: list[tuple[int, str, bool]]) -> None:
    """Held against a dictionary of who has what."""
    objects = MemoryStore()
    holders = [Holder(objects, str(n), PATIENCE) for n in range(3)]
    for holder in holders:
        obstore.put(objects, f"holders/{holder.name}", b"")
    owner: dict[str, int] = {}
    for who, lease, take in steps:
        if take:
            assert holders[who].take(lease) is (owner.setdefault(lease, who) == who)
        elif owner.get(lease) == who:
            holders[who].give_back(lease)
            del owner[lease]

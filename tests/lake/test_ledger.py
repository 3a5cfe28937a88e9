"""What a ledger remembers of scenes, and of runs that were left."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest

from segpipe.lake.entry import LakeEntry
from segpipe.lake.ledger import Ledger
from segpipe.tables.record import SceneRecord


def found(name: str, etag: str = "1") -> LakeEntry:
    return LakeEntry(
        name, f"s3://lake/{name}.tif", {"etag": etag, "size": 3}, 3, datetime(2026, 1, 1, tzinfo=UTC)
    )


def done(name: str) -> SceneRecord:
    return SceneRecord(name, f"s3://lake/{name}.tif", "done", files={"labels": f"scenes/{name}/labels.tif"})


def failed(name: str, may_pass: bool) -> SceneRecord:
    return SceneRecord(name, f"s3://lake/{name}.tif", "failed", error="no such bits", may_pass=may_pass)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path), "nightly-12345678")


def state(ledger: Ledger, scene: LakeEntry) -> str | None:
    with ledger.known() as known:
        return known.state(scene.digest)


def test_a_done_scene_is_known_until_its_content_changes(ledger: Ledger) -> None:
    assert state(ledger, found("a")) is None
    ledger.finish(found("a"), done("a"), "run-1")
    assert state(ledger, found("a")) == "done"
    assert ledger.is_done(found("a").digest)
    assert state(ledger, found("a", etag="2")) is None
    assert state(ledger, found("b")) is None


def test_a_fault_that_passes_is_tried_again_a_mistake_is_not(ledger: Ledger) -> None:
    assert not ledger.fail(found("a"), failed("a", True), "run-1", most=3)
    assert not ledger.fail(found("a"), failed("a", True), "run-2", most=3)
    assert state(ledger, found("a")) is None
    assert ledger.fail(found("a"), failed("a", True), "run-3", most=3)
    assert ledger.fail(found("b"), failed("b", False), "run-3", most=3)
    assert state(ledger, found("a")) == state(ledger, found("b")) == "quarantine"
    a, b = ledger.quarantined()
    assert (a.name, a.reason, a.tries) == ("a", "no such bits", 3)
    assert (b.name, b.uri, b.tries) == ("b", "s3://lake/b.tif", 1)


def test_a_released_scene_is_new(ledger: Ledger) -> None:
    ledger.fail(found("a"), failed("a", False), "run-1", most=3)
    (held,) = ledger.quarantined()
    ledger.release(held)
    assert state(ledger, found("a")) is None
    assert ledger.quarantined() == []
    assert not ledger.fail(found("a"), failed("a", True), "run-2", most=2)  # tries count from the start


def test_success_forgets_the_tries(ledger: Ledger) -> None:
    ledger.fail(found("a"), failed("a", True), "run-1", most=2)
    ledger.finish(found("a"), done("a"), "run-2")
    ledger.fail(found("a", "2"), failed("a", True), "run-3", most=2)
    assert ledger.quarantined() == []


def test_a_run_that_was_left_has_its_records(ledger: Ledger) -> None:
    ledger.begin_run("run-1", "2026-01-01T00:00:00+00:00")
    ledger.finish(found("b"), done("b"), "run-1")
    ledger.finish(found("a"), done("a"), "run-1")
    ledger.fail(found("c"), failed("c", False), "run-1", most=1)
    ledger.finish(found("x"), done("x"), "run-0")
    assert ledger.open_runs() == ["run-1"]
    assert ledger.started("run-1") == "2026-01-01T00:00:00+00:00"
    assert ledger.records("run-1") == [done("a"), done("b"), failed("c", False)]
    ledger.end_run("run-1")
    assert ledger.open_runs() == []
    assert ledger.records("run-1") == []
    assert state(ledger, found("a")) == "done"


def test_what_is_done_under_another_identity_is_known_by_both(ledger: Ledger) -> None:
    same = LakeEntry("a", "s3://lake/a.tif", {"sha256": "00"}, 3, None)
    ledger.finish(same, done("a"), "run-1")
    ledger.alias(found("a"), same.digest)
    assert state(ledger, found("a")) == "done"


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_scenes(tmp_path: Path) -> None:
    peaks = []
    for number in (2_000, 40_000):
        folder = tmp_path / str(number) / ".lake" / "n" / "done"
        folder.mkdir(parents=True)
        for n in range(number):
            (folder / f"{n:032x}.json").touch()
        tracemalloc.start()
        with Ledger(str(tmp_path / str(number)), "n").known() as known:
            assert known.state(f"{number - 1:032x}") == "done"
            assert known.state(f"{number:032x}") is None
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1 << 20

"""Scans whose process is killed at a scene, or paused until another scan has taken its lease over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient

from segpipe.config.scan import Scan
from segpipe_flows.scan import scan
from tests.flows.test_scan import ScanMaker, lake, make, records

__all__ = ["lake", "make"]  # fixtures

PROGRAM = (
    "import sys; from segpipe.config.scan import load_scan; from segpipe_flows.scan import scan; "
    "scan(load_scan(sys.argv[1]), return_state=True)"
)


@contextmanager
def process(asked: Scan, environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A scan in a process of its own."""
    file = folder / "scan.yaml"
    file.write_text(asked.model_dump_json())  # JSON is YAML
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def tries(asked: Scan) -> dict[str, int]:
    """Tries that the ledger shows, by the scene's name."""
    found = {}
    for path in Path(asked.outputs.dir, ".lake").glob("*/tries/*.json"):
        try:
            told = json.loads(path.read_text().splitlines()[0])
        except (FileNotFoundError, IndexError):  # ended meanwhile
            continue
        found[told["name"]] = told["tries"]
    return found


def wait_for_try(asked: Scan, name: str, count: int) -> None:
    """Look so often that the try has not ended."""
    end = time.monotonic() + 120
    while tries(asked).get(name) != count:
        assert time.monotonic() < end, f"try {count} of {name} did not begin"
        time.sleep(0.002)


@pytest.mark.slow
def test_a_scene_that_kills_its_process_is_set_aside_and_the_others_are_done(
    on_server: SyncPrefectClient, make: ScanMaker, server_environment: dict[str, str], tmp_path: Path
) -> None:
    asked = make(attempts=2, lease_seconds=1)
    for count in (1, 2):
        with process(asked, server_environment, tmp_path) as running:
            wait_for_try(asked, "scene_1", count)
            running.kill()
        assert tries(asked)["scene_1"] == count
        time.sleep(1.5)  # its lease ends
    state = scan(asked, return_state=True)
    assert state.is_failed()
    died = "1 failed, 1 of them in quarantine (scene_1: the process died at each of 2 tries"
    assert str(state.message).startswith(died)
    (record,) = records(asked)
    assert [scene.name for scene in record.done] == ["north__scene_0", "scene_0", "scene_2"]
    assert tries(asked) == {}
    assert scan(asked, return_state=True).message == "nothing to do: 3 done before, 1 in quarantine"


def written(asked: Scan) -> dict[str, tuple[int, int]]:
    """Files of the ledger and of the runs, and when each was written; signs of life are not counted."""
    out = Path(asked.outputs.dir)
    found: dict[str, Any] = {}
    for place in (out / ".lake", out / asked.name):
        for path in place.rglob("*"):
            if path.is_file() and path.parent.name != "holders":
                found[str(path)] = (path.stat().st_mtime_ns, path.stat().st_ino)
    return found


@pytest.mark.slow
def test_a_scan_that_was_paused_and_taken_over_writes_nothing_more(
    on_server: SyncPrefectClient, make: ScanMaker, server_environment: dict[str, str], tmp_path: Path
) -> None:
    asked = make(lease_seconds=1)
    with process(asked, server_environment, tmp_path) as running:
        wait_for_try(asked, "north__scene_0", 1)
        os.kill(running.pid, signal.SIGSTOP)
        assert tries(asked)
        time.sleep(1.5)  # its lease ends
        state = scan(asked, return_state=True)
        assert state.is_completed()
        (record,) = records(asked)
        assert len(record.done) == 4
        before = written(asked)
        os.kill(running.pid, signal.SIGCONT)
        running.wait(120)
    assert written(asked) == before


def test_a_scene_larger_than_the_limit_is_passed_over(
    on_server: SyncPrefectClient, make: ScanMaker, lake: Path
) -> None:
    with (lake / "scene_0.tif").open("r+b") as file:
        file.truncate(2**20)
    asked = make(limits={"size": "0.9MiB"})
    state = scan(asked, return_state=True)
    told = "3 done, 3 new, 1 too large for limits.size (scene_0: 1.0 MiB); report: "
    assert str(state.message).startswith(told), state.message

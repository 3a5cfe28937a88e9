"""A lake is scanned again and again: each scene is done once, damaged ones are set aside, left runs go on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import obstore
import pytest
import rasterio
from prefect import State
from prefect.client.orchestration import SyncPrefectClient

from segpipe.cli.main import execute
from segpipe.config.scan import Scan
from segpipe.export.run_folder import RunFolder, now
from segpipe.lake.entry import LakeEntry
from segpipe.lake.lease import Holder
from segpipe.lake.ledger import Receipts
from segpipe.lake.listing import list_lake
from segpipe.lake.selection import check_scan
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tables.record import RunRecord, load_record
from segpipe_flows.scan import scan
from segpipe_tasks.scenes import do_scenes
from tests.flows.conftest import wait_until


@pytest.fixture
def lake(tmp_path: Path, flow_scenes: Path) -> Path:
    """Three scenes in a folder, and one a level deeper."""
    folder = tmp_path / "lake"
    (folder / "north").mkdir(parents=True)
    for n in range(3):
        cut(flow_scenes / "scene_0.tif", folder / f"scene_{n}.tif", n)
    cut(flow_scenes / "scene_1.tif", folder / "north" / "scene_0.tif", 3)
    return folder


def cut(source: Path, target: Path, n: int) -> None:
    """A piece of 96 x 96 of a scene."""
    with rasterio.open(source) as scene:
        window = rasterio.windows.Window(32 * n, 16 * n, 96, 96)
        profile = {**scene.profile, "width": 96, "height": 96, "transform": scene.window_transform(window)}
        with rasterio.open(target, "w", **profile) as piece:
            piece.write(scene.read(window=window))


ScanMaker = Callable[..., Scan]


@pytest.fixture
def make(tmp_path: Path, flow_models: Callable[[int], Path], lake: Path) -> ScanMaker:
    """``make(lake={…}, …)``: a scan of the lake."""

    def made(**fields: Any) -> Scan:
        where = {"location": str(lake), "settle_seconds": 0, **fields.pop("lake", {})}
        data = {
            "name": "nightly",
            "lake": where,
            "model": str(flow_models(0)),
            "bands": ["near", "far"],
            "outputs": {"dir": str(tmp_path / "out"), "formats": ["cog"]},
            "compute": {"device": "cpu", "threads": 1, "batch": 2},
            **fields,
        }
        return Scan.model_validate(data)

    return made


def records(asked: Scan) -> list[RunRecord]:
    """Of the runs that have ended, the oldest first."""
    folder = Path(asked.outputs.dir, asked.name)
    return [load_record(path.read_bytes()) for path in sorted(folder.glob("*/run.json"))]


def names(record: RunRecord) -> list[str]:
    return [scene.name for scene in record.scenes]


def predictions(asked: Scan) -> dict[Path, int]:
    """Shards of labels, and when each was written."""
    shards = Path(asked.outputs.dir, ".store").glob("predict-*/**/labels/c/*/*")
    return {path: path.stat().st_mtime_ns for path in shards}


def events(client: SyncPrefectClient, run: Path) -> list[dict[str, Any]]:
    """Of a run's scenes that are done, as an automation would get them."""
    asked = {"filter": {"event": {"name": ["segpipe.scene.done"]}}, "limit": 50}
    found = client.request("POST", "/events/filter", json=asked).json()["events"]
    return [event for event in found if event["payload"]["run"] == str(run)]


def test_each_scene_is_done_once(on_server: SyncPrefectClient, make: ScanMaker, lake: Path) -> None:
    asked = make()
    state = scan(asked, return_state=True)
    assert state.is_completed()
    assert str(state.message).startswith("4 done, 4 new; report: ")
    assert names(records(asked)[0]) == ["north__scene_0", "scene_0", "scene_1", "scene_2"]
    before = predictions(asked)
    assert len(before) == 4
    folder = Path(asked.outputs.dir, asked.name, records(asked)[0].run_id)
    wait_until(lambda: len(events(on_server, folder)) == 4, 60, "an event for each scene")
    assert {e["resource"]["prefect.resource.name"] for e in events(on_server, folder)} == {
        scene.name for scene in records(asked)[0].scenes
    }

    again = scan(asked, return_state=True)
    assert again.is_completed()
    assert again.message == "nothing to do: 4 done before"

    shutil.copy(lake / "scene_0.tif", lake / "late.tif")
    cut(lake / "scene_1.tif", lake / "scene_2.tif", 0)  # written again, with something else in it
    more = scan(asked, return_state=True)
    assert str(more.message).startswith("2 done, 2 new, 3 done before; report: ")
    assert names(records(asked)[1]) == ["late", "scene_2"]
    assert {path: at for path, at in predictions(asked).items() if path in before} == before


def test_damaged_scenes_are_set_aside_with_the_reason(
    on_server: SyncPrefectClient,
    make: ScanMaker,
    lake: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (lake / "scene_1.tif").write_bytes((lake / "scene_1.tif").read_bytes()[:900])
    (lake / "text.tif").write_text("not an image")
    asked = make()
    state = scan(asked, return_state=True)
    assert state.is_failed()
    assert "2 failed, 2 of them in quarantine (scene_1: " in str(state.message)
    assert "text: " in str(state.message)
    (record,) = records(asked)
    assert [scene.name for scene in record.done] == ["north__scene_0", "scene_0", "scene_2"]
    assert [scene.name for scene in record.failed] == ["scene_1", "text"]
    assert all(str(lake) in scene.error for scene in record.failed)

    again = scan(asked, return_state=True)
    assert again.is_completed()
    assert again.message == "nothing to do: 3 done before, 2 in quarantine"

    file = tmp_path / "scan.yaml"
    file.write_text(asked.model_dump_json())  # JSON is YAML
    assert execute(["quarantine", str(file)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["scene_1", "text"]
    assert execute(["quarantine", str(file), "--release", "nothing"]) == 2
    assert "there are: scene_1, text" in capsys.readouterr().err
    assert execute(["quarantine", str(file), "--release", "text"]) == 0
    cut(lake / "scene_0.tif", lake / "scene_1.tif", 0)  # mended: no longer the one in quarantine
    third = scan(asked, return_state=True)
    assert third.is_failed()
    assert str(third.message).startswith("1 failed, 1 of them in quarantine (text: ")
    assert [scene.name for scene in records(asked)[1].done] == ["scene_1"]


def test_two_scans_at_once_do_nothing_twice(
    on_server: SyncPrefectClient, make: ScanMaker, lake: Path
) -> None:
    """The other scan is at one scene, and has done another since the ledger was read."""
    asked = make()
    ledger = check_scan(asked).ledger
    listed: dict[str, LakeEntry] = {found.name: found for found in list_lake(asked.lake)}
    with Holder(ledger.objects, "other", 60).alive() as other:
        assert other.take(listed["scene_0"].digest)
        state = scan(asked, return_state=True)
        assert str(state.message).startswith("3 done, 3 new, 1 in another scan; report: ")
    after = scan(asked, return_state=True)
    assert str(after.message).startswith("1 done, 1 new, 3 done before; report: ")
    assert [names(record) for record in records(asked)] == [
        ["north__scene_0", "scene_1", "scene_2"],
        ["scene_0"],
    ]


def test_a_scan_that_was_killed_goes_on_in_its_run(on_server: SyncPrefectClient, make: ScanMaker) -> None:
    """The killed one had done two scenes, and left its leases without a sign of life."""
    whole = make(name="whole")
    assert scan(whole, return_state=True).is_completed()
    asked = make(limits={"scenes": 2}, lease_seconds=1)
    assert scan(asked, return_state=True).is_completed()
    (first,) = records(asked)
    # what a kill leaves: the run is open with its records, the report is not there
    ledger = check_scan(asked).ledger
    folder = Path(asked.outputs.dir, asked.name, first.run_id)
    ledger.begin_run(first.run_id, first.started)
    for found in list_lake(asked.lake):
        for record in first.scenes:
            if record.name == found.name:
                ledger.finish(found, record, first.run_id)
    (folder / "run.json").unlink()
    killed = Holder(ledger.objects, str(uuid4()), 1)
    assert killed.take(f"run-{first.run_id}")
    obstore.put(ledger.objects, f"holders/{killed.name}", b"")
    time.sleep(1.5)

    state = scan(asked, return_state=True)
    assert str(state.message).startswith("4 done, 2 new, 2 done before; report: ")
    (record,) = records(asked)
    assert record.run_id == first.run_id
    assert names(record) == names(records(whole)[0])
    tables = [
        Path(s.outputs.dir, s.name, r.run_id, "regions.csv")
        for s, r in ((asked, record), (whole, records(whole)[0]))
    ]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert ledger.open_runs() == []
    assert scan(asked, return_state=True).message == "nothing to do: 4 done before"


def test_a_pack_that_is_stopped_keeps_what_it_has_done(on_server: SyncPrefectClient, make: ScanMaker) -> None:
    asked = make()
    request = check_scan(asked)
    founds = {found.name: found for found in list_lake(asked.lake)}
    run = RunFolder(asked.outputs.dir, asked.name, "20260101-000000-left", now())
    request.ledger.begin_run(run.name, run.started)

    def stopped_after_one() -> Iterator[SceneRef]:
        one, two, *_ = founds.values()
        yield SceneRef(one.name, one.uri)
        StopToken(asked.outputs.dir, "left").request()
        yield SceneRef(two.name, two.uri)

    receipts = Receipts(request.ledger, run.name, founds)
    scenes = stopped_after_one()
    ended = do_scenes.fn(
        request.resolved, scenes, run, StopToken(asked.outputs.dir, "left"), receipts, "one", 1
    )
    assert isinstance(ended, State)
    assert ended.is_cancelled()
    done = [name for name in founds if receipts.of(name)]
    assert done == [next(iter(founds))]
    before = predictions(asked)
    assert len(before) == 1
    again = [SceneRef(name, founds[name].uri) for name in done]
    kept = do_scenes.fn(
        request.resolved, again, run, StopToken(asked.outputs.dir, "again"), receipts, "one", 0
    )
    assert kept == [receipts.of(name) for name in done]
    assert predictions(asked) == before
    state = scan(asked, return_state=True)
    assert str(state.message).startswith("4 done, 3 new, 1 done before; report: ")
    assert records(asked)[0].run_id == run.name
    assert before.items() <= predictions(asked).items()


def test_limits_leave_the_rest_for_the_next_scan(on_server: SyncPrefectClient, make: ScanMaker) -> None:
    asked = make(limits={"scenes": 3})
    state = scan(asked, return_state=True)
    assert str(state.message).startswith("3 done, 3 new; limits.scenes of 3 reached, more may wait; report: ")
    assert str(scan(asked, return_state=True).message).startswith("1 done, 1 new, 3 done before; report: ")
    size = make(name="size", limits={"size": "0.2MiB"})  # a scene is 72 KiB and a header
    state = scan(size, return_state=True)
    assert str(state.message).startswith("2 done, 2 new; limits.size of 0.2MiB reached")


def test_dry_run_and_settling(
    on_server: SyncPrefectClient, make: ScanMaker, lake: Path, tmp_path: Path
) -> None:
    old = time.time() - 3600
    for path in lake.glob("scene_*.tif"):
        os.utime(path, (old, old))
    asked = make(lake={"settle_seconds": 600}, dry_run=True)
    state = scan(asked, return_state=True)
    assert state.is_completed()
    assert state.message == "dry run: 3 new, 1 still settling; nothing was done"
    assert not Path(asked.outputs.dir, asked.name).exists()
    real = make(lake={"settle_seconds": 600})
    state = scan(real, return_state=True)
    assert str(state.message).startswith("3 done, 3 new, 1 still settling; report: ")


def test_by_content_a_touched_file_is_not_done_again(
    on_server: SyncPrefectClient, make: ScanMaker, lake: Path
) -> None:
    asked = make(lake={"identity": "content"})
    assert scan(asked, return_state=True).is_completed()
    old = time.time() - 3600
    os.utime(lake / "scene_0.tif", (old, old))
    assert scan(asked, return_state=True).message == "nothing to do: 4 done before"
    assert len(records(asked)) == 1
    by_stat = make(name="stat")
    assert scan(by_stat, return_state=True).is_completed()
    os.utime(lake / "scene_0.tif", (old + 60, old + 60))
    assert str(scan(by_stat, return_state=True).message).startswith("1 done, 1 new, 3 done before; report: ")


def test_many_small_scenes_share_task_runs(
    on_server: SyncPrefectClient, make: ScanMaker, lake: Path, flow_scenes: Path
) -> None:
    """The same bytes as one by one, with a few task runs instead of three for each scene."""
    rng = np.random.default_rng(3)
    for n in range(40):
        cut(flow_scenes / "scene_2.tif", lake / f"small_{n:02}.tif", int(rng.integers(0, 5)))
    (lake / "small_07.tif").write_text("not an image")
    asked = make(name="packed")
    state = scan(asked, return_state=True)
    assert str(state.message).startswith("1 failed, 1 of them in quarantine (small_07: ")
    (record,) = records(asked)
    assert len(record.done) == 43
    runs = [r for r in on_server.read_task_runs(limit=200) if r.name.endswith("more")]
    assert 1 <= len(runs) <= 12
    one_by_one = make(name="few", lake={"pattern": "small_1*.tif"})
    assert scan(one_by_one, return_state=True).is_completed()
    for scene in records(one_by_one)[0].scenes:
        maps = [
            Path(asked.outputs.dir, r.job_name, r.run_id, "scenes", scene.name, "labels.tif")
            for r in (record, records(one_by_one)[0])
        ]
        with rasterio.open(maps[0]) as packed, rasterio.open(maps[1]) as single:
            np.testing.assert_array_equal(packed.read(), single.read())


def test_mistakes_are_told_before_any_work(
    on_server: SyncPrefectClient, make: ScanMaker, tmp_path: Path
) -> None:
    state = scan(make(lake={"location": str(tmp_path / "nowhere")}), return_state=True)
    assert state.is_failed()
    assert "lake.location" in str(state.message)
    assert "nowhere" in str(state.message)
    inside = make(outputs={"dir": str(tmp_path / "lake" / "out")})
    state = scan(inside, return_state=True)
    assert str(state.message).startswith(f"outputs.dir: {tmp_path}/lake/out lies in the lake ")
    beside = inside.model_dump(mode="json") | {
        "lake": {"location": str(tmp_path / "lake"), "pattern": "*.tif"}
    }
    check_scan(Scan.model_validate(beside))  # the pattern takes no folders
    file = tmp_path / "scan.yaml"
    file.write_text("name: x\nlake: {location: there, settle: 3}\n")
    assert execute(["scan", str(file)]) == 2

"""Targets: what segpipe reads back from its store, its runs and its lakes, and STAC."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from segpipe.store.location import STORE_FOLDER
from tools.fuzz.target import Target

STORED = ("stage.json", "receipts-00/0.json", "receipts-00.json", "parts-00/table.npz")


def read_stage(folder: Path) -> None:
    """Look through a stage: its record, receipts and a table beside its arrays."""
    from segpipe.errors import SceneError
    from segpipe.objects.table import ObjectTable
    from segpipe.store.stage import Stage

    stage = Stage(str(folder), "measure-1")
    assert stage.exists in (True, False)
    stage.done()
    stage.receipts()
    stage.receipt("0")
    with suppress(SceneError):
        ObjectTable.of(stage.read_part("table.npz"))
    stage.scrub()


def read_ledger(folder: Path) -> None:
    """Read all that a lake's ledger says."""
    from segpipe.lake.entry import LakeEntry
    from segpipe.lake.lease import Holder
    from segpipe.lake.ledger import Ledger

    ledger = Ledger(str(folder), "scan-1")
    entry = LakeEntry("a", "lake/a.tif", {"size": 1}, 1, None)
    for place in ("done", "tries"):
        source = folder / f".lake/scan-1/{place}/0.json"
        if source.exists():
            source.rename(source.with_name(f"{entry.digest}.json"))
    ledger.quarantined()
    ledger.records("1")
    ledger.started("1")
    ledger.is_done(entry.digest)
    Holder(ledger.objects, "me", 1.0).take("0")
    with ledger.known() as known:
        known.state(entry.digest)


def read_run(folder: Path) -> None:
    """Open a run by its folder: record, tables, page of changes against itself, manifest."""
    from segpipe.runs.compare import compare_runs
    from segpipe.runs.find_run import load_run
    from segpipe.runs.finished import Run

    place = str(folder / "out/job/run")
    run = Run(*load_run(place))
    assert run.failed is not None
    for name in ("regions", "metrics"):
        run.table(name)
    compare_runs(place, place)


def read_manifest(folder: Path) -> None:
    """Hold a run against its manifest."""
    from segpipe.export.run_folder import check_manifest

    check_manifest(str(folder))


def read_stac(folder: Path) -> None:
    """List a catalogue with an item; nothing is fetched."""
    from segpipe.config.scan import Lake
    from segpipe.lake.stac import list_stac

    if any("://" in path.read_text("latin-1").replace("\\", "") for path in folder.glob("*.json")):
        return
    for entry in list_stac(Lake(location=str(folder / "catalog.json"), kind="stac")):
        assert entry.digest
        json.dumps(entry.identity)


TARGETS = (
    Target(
        "stage", read_stage, tuple(f"{STORE_FOLDER}/measure-1/{name}" for name in STORED),
        "json json json bytes", mutants=40,
    ),
    Target(
        "ledger", read_ledger,
        tuple(
            f".lake/scan-1/{name}"
            for name in (
                "done/0.json", "quarantine/0.json", "tries/0.json", "records/1/0.json", "open/1.json",
                "leases/0/1",
            )
        ),
        "json", mutants=60,
    ),
    Target(
        "run", read_run, tuple(f"out/job/run/{n}" for n in ("run.json", "regions.parquet")),
        "json bytes", mutants=16,
    ),
    Target("manifest", read_manifest, ("manifest.json", "run.json"), "json", mutants=40),
    Target(
        "stac", read_stac, ("catalog.json", "item.json"), "json", mutants=40
    ),
)  # fmt: skip

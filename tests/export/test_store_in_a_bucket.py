"""The commands of the store on an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from finished import finish
from world import World

from segpipe.cli.main import execute
from segpipe.runs.references import references, survey
from segpipe.store.location import join, open_store


def test_usage_check_and_gc(
    world: World, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{bucket}/life"
    path = world.job(tmp_path / "out", outputs={"keep": ["labels"]})
    job = yaml.safe_load(path.read_text())
    job["outputs"]["dir"] = out
    path.write_text(yaml.safe_dump(job))
    run, record = finish(path)
    assert record.done
    store = open_store(join(out, ".store"))
    listed = {m["path"]: m["size"] for chunk in store.list() for m in chunk}
    found = survey(out)
    assert {stage.kind for stage in found.stages} == {"predict", "measure"}  # the ingest is not kept
    assert sum(stage.size for stage in found.stages) == sum(listed.values())
    assert {r.pinned for r in references(out)} == {"", "keep", "report"}
    assert execute(["store", "check", out]) == 0
    shard = next(name for name in listed if "/labels/c/" in name)
    store.put(shard, b"x")
    store.put("stop/local-0123456789abcdef", b"")
    capsys.readouterr()
    assert execute(["store", "check", out, "--repair", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert len(told["damaged"]) == 1 and "predict-" in told["damaged"][0]
    assert execute(["store", "check", out]) == 0
    assert execute(["store", "gc", out, "--older", "0s", "--yes"]) == 0
    assert {m["path"] for chunk in store.list() for m in chunk} == set(listed)
    assert execute(["store", "gc", out, "--run", run.name, "--yes"]) == 0
    assert [m for chunk in store.list() for m in chunk] == []

"""The compare flow on a real server: what it says, what the UI shows, and what it refuses."""

# ruff: noqa: F811 (a fixture of another folder is imported, and its name is an argument)

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterName,
)
from world import NODATA, PIXEL, World, nearest_label

from segpipe.report.comparison import compare_markdown
from segpipe.runs.compare import compare_runs
from segpipe_flows.compare import compare
from tests.compare.conftest import runs, shifted  # noqa: F401 (fixtures: two runs of two scenes, by two models)
from tests.compare.tools import NAMES, SHIFT


def hectares(world: World, shift: float) -> dict[str, float]:
    """What a model whose thresholds lie ``shift`` higher finds in both scenes, counted here."""
    found = np.zeros(3)
    for seed in (1, 2):
        nir = world.pixels(seed)[1]
        labels = np.where(nir > 0, nearest_label(nir - shift), NODATA)
        found += [(labels == value).sum() for value in range(3)]
    return dict(zip(NAMES, found * PIXEL**2 / 1e4, strict=True))


def cells(markdown: str, title: str) -> pd.DataFrame:
    """The table below a heading."""
    lines = markdown.split(f"## {title}\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(rows, columns=head)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_changes_are_told_and_shown(
    on_server: SyncPrefectClient,
    world: World,
    runs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    before, after = map(str, runs)
    state = compare(before, after, str(tmp_path / "out"), return_state=True)
    assert state.is_completed()
    page = tmp_path / "out" / "compare.html"
    assert page.is_file()
    assert state.message is not None
    assert state.message.endswith(f"; page: {page}")
    names = [Path(run).name for run in (before, after)]
    named = FlowRunFilter(name=FlowRunFilterName(any_=[" → ".join(names)]))
    (flow_run,) = on_server.read_flow_runs(flow_run_filter=named)

    (artifact,) = artifacts(on_server, flow_run.id)
    assert (artifact.type, artifact.key) == ("markdown", "trial-compare")
    markdown = str(artifact.data)
    assert f"Page: `{page}`" in markdown
    totals = cells(markdown, "Area by class").set_index("Class")
    old, new = hectares(world, 0), hectares(world, SHIFT)
    for name in NAMES:
        row = totals.loc[name]
        assert number(row["Before (ha)"]) == pytest.approx(old[name], abs=0.0501)
        assert number(row["After (ha)"]) == pytest.approx(new[name], abs=0.0501)
        assert number(row["Change"]) == pytest.approx(new[name] - old[name], abs=0.0501)
        relative = 100 * (new[name] - old[name]) / old[name]
        assert number(row["Relative"].removesuffix(" %")) == pytest.approx(relative, abs=0.0501)
    changed = cells(markdown, "Area that changed most")
    sizes = [abs(number(text)) for text in changed["Change (ha)"]]
    assert sizes == sorted(sizes, reverse=True)
    set_otherwise = cells(markdown, "Set otherwise").set_index("Key")
    assert tuple(set_otherwise.loc["model"]) == ("nearest", "shifted")
    assert tuple(set_otherwise.loc["job.tiling.blend"]) == ("trim", "gaussian")


def test_a_wrong_run_is_refused_in_one_line(
    on_server: SyncPrefectClient,
    runs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    state = compare(str(tmp_path / "none"), str(runs[1]), return_state=True)
    assert state.is_failed()
    assert state.message is not None
    assert re.match(rf"{tmp_path}/none: ", state.message)
    assert "\n" not in state.message


def test_names_are_no_markdown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A class called as a table's border would be stays one cell."""
    found = compare_runs(str(runs[0]), str(runs[1]), str(tmp_path / "out"))
    for table in (found.rows, found.totals):
        table["class"] = table["class"].replace("water", "wa|ter *x*")
    lines = compare_markdown(found).splitlines()
    (total,) = [line for line in lines if line.startswith("| wa")]
    assert total.startswith(r"| wa\|ter \*x\* |")


def artifacts(client: SyncPrefectClient, run_id: UUID) -> list:  # type: ignore[type-arg]
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    return client.read_artifacts(artifact_filter=mine)

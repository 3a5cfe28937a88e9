"""What the demo shows, against outside oracles: deepbet's own result, and the card's published scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio

from segpipe.config.card import read_card
from segpipe.config.job import Job
from segpipe.inference.settings import resolve_settings
from segpipe.metrics.overlap import class_counts
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.sources import discover, package_file
from segpipe_flows.demo import BRAIN, WEST_COLUMNS, _prepare_brain

LANDSAT = Path(__file__).parents[1].parent / "shared" / "data" / "nc_landsat"


def segmented(**keys: object) -> Scene:
    job = Job.model_validate(keys)
    ref = discover(job.scenes)[0]
    scene = create_stages(
        prepare_scene(
            job, read_card(job.model), ref, resolve_settings(job.compute, read_card(str(job.model)))
        )
    )
    predict_blocks(scene, pending_blocks(scene))
    finish_labels(scene)
    return scene


def test_brain_equals_deepbet_voxel_by_voxel(tmp_path: Path) -> None:
    bet = pytest.importorskip("deepbet.bet", reason="deepbet is not installed")
    pytest.importorskip("nilearn", reason="nilearn is not installed")
    _prepare_brain(tmp_path)
    scene = segmented(
        scenes=[BRAIN.format("t1")],
        model="configs/models/brain-volume.yaml",
        regions={"path": str(tmp_path / "tissues.nii.gz"), "name": str(tmp_path / "tissues.csv")},
        reference={"path": str(tmp_path / "reference.nii.gz")},
        outputs={"dir": str(tmp_path / "out")},
    )
    with scene.open_labels() as read:
        ours = read(scene.geometry.box).T
    _, mask, millilitres = bet.BrainExtraction(no_gpu=True).run(nib.load(package_file(BRAIN.format("t1"))))
    theirs = np.asarray(mask.dataobj).astype(bool)
    # Threads differ: of nine million voxels, one whose probability is ½ but for rounding may change sides.
    assert np.count_nonzero((ours == 1) != theirs) <= 2
    assert round(millilitres) == 1953
    measured, _ = measure_scene(scene)
    assert measured.regions == ("scene", "grey matter", "white matter", "elsewhere")
    counts = class_counts(measured.tally)[(0, 1)]
    reference = nib.load(tmp_path / "reference.nii.gz").get_fdata() > 0
    dice = 2 * ((ours == 1) & reference).sum() / ((ours == 1).sum() + reference.sum())
    assert counts.dice == pytest.approx(dice, abs=1e-12)
    assert round(dice, 3) == 0.939


@pytest.mark.skipif(not LANDSAT.exists(), reason=f"the Landsat scene is not at {LANDSAT}")
def test_landcover_scores_what_its_card_says(tmp_path: Path) -> None:
    """The stored weights, tiled, on the east alone: the scores that training wrote, within tiling's seams."""
    with rasterio.open(LANDSAT / "strata.tif") as strata:
        labels = np.where(strata.read_masks(1) > 0, strata.read(1), 0).astype(np.uint8)
        labels[:, :WEST_COLUMNS] = 0
        profile = {**strata.profile, "dtype": "uint8", "nodata": 0}
    with rasterio.open(tmp_path / "east.tif", "w", **profile) as east:
        east.write(labels, 1)
    scene = segmented(
        scenes=[str(LANDSAT / "landsat_multiband.tif")],
        model="configs/models/landcover-unet.yaml",
        bands=["blue", "green", "red", "nir", "swir16"],
        reference={"path": str(tmp_path / "east.tif")},
        outputs={"dir": str(tmp_path / "out")},
    )
    measured, _ = measure_scene(scene)
    counts = class_counts(measured.tally)
    published = json.loads(Path("configs/models/landcover-unet/scores.json").read_text())
    east = published["east"]
    right = sum(counts[(0, v)].tp for v in range(1, 8))
    every = sum(counts[(0, v)].tp + counts[(0, v)].fn for v in range(1, 8))
    assert right / every == pytest.approx(east["pixel_accuracy"], abs=2e-3)
    for value, row in enumerate(east["classes"].values(), start=1):
        assert counts[(0, value)].iou == pytest.approx(row["iou"], abs=5e-3)


def test_only_data_asks_for_no_model(tmp_path: Path) -> None:
    """`--help` of the demo says what it does, without fetching anything."""
    command = [sys.executable, "-m", "segpipe_flows.demo", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "--data-only" in done.stdout
    assert "two jobs on real data" in done.stdout

"""Uncertainty, calibration and surfaces from job to table: scipy's, torchmetrics' and MONAI's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.stats import entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from segpipe.config.job import Job
from segpipe.errors import RequestError
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import export_scene
from segpipe.metrics.tally import LEVELS
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.runs.check import check_request
from segpipe.sources import discover
from segpipe.tables.frames import MEASURED
from segpipe.tables.record import ClassInfo
from segpipe.tables.scene_tables import (
    ALL_CLASSES,
    NOT_DEFINED,
    Intensities,
    SceneIntensity,
    SceneSurfaces,
    surface_table,
    uncertainty_table,
)
from tests.inference.lab import CENTRED, Lab, labels_of, patches, predict, prepared, scores_of

INPUT = {"input": {"bands": ["b0"], "normalisation": CENTRED}}
SHAPE = (70, 83)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def doubt_of(scene: Any) -> np.ndarray:
    return np.asarray(scene.predict.array("uncertainty")[...])


def uncertain(lab: Lab, out: str, ref: Any, card: str, **keys: Any) -> Job:
    outputs = {"dir": str(lab.folder / out), "scores": True, "uncertainty": True, "keep": ["labels", "image"]}
    return Job.model_validate({"scenes": [ref.uri], "model": card, "outputs": outputs, **keys})


def test_the_map_is_what_the_scores_say(lab: Lab) -> None:
    ref, card = lab.raster(patches(SHAPE)), lab.card(2, **INPUT)
    scene = prepared(uncertain(lab, "out", ref, card), ref)
    predict(scene)
    scores, found = scores_of(scene).astype(np.float64), doubt_of(scene) / LEVELS
    ordered = np.sort(scores, axis=0)
    assert scene.uncertainty == ("entropy", "margin", "confidence")
    np.testing.assert_allclose(found[0], entropy(scores, axis=0, base=len(scores)), atol=2e-5)
    np.testing.assert_allclose(found[1], ordered[-1] - ordered[-2], atol=1e-5)
    np.testing.assert_allclose(found[2], ordered[-1], atol=1e-5)
    classes = np.array(scene.card.values)
    np.testing.assert_array_equal(classes[scores.argmax(0)], labels_of(scene))


def test_the_map_of_a_resampled_volume_does_not_depend_on_blocks(lab: Lab) -> None:
    """Turned and on another spacing: scores, and the entropies that ride along, go through the grid."""
    ref = lab.volume(patches((30, 26, 34))[0], np.diag([-1.0, 1.2, 1.5, 1.0]))
    changes = {"orientation": "RAS", "spacing": [1.3, 1.3, 1.3], "normalisation": CENTRED}
    card = lab.card(3, input=changes)
    found = []
    for out, block in (("one", "auto"), ("two", "13x17x34")):
        tiling = {"block": block, "blend": "gaussian"}
        scene = prepared(uncertain(lab, out, ref, card, tiling=tiling), ref)
        predict(scene)
        found.append((doubt_of(scene), scores_of(scene), labels_of(scene)))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)
    doubt, scores = found[0][0] / LEVELS, found[0][1].astype(np.float64)
    p = np.clip(scores, 0, 1)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    np.testing.assert_allclose(doubt[0], np.clip(-(p * logs).sum(0) / np.log(len(p)), 0, 1), atol=2e-5)
    np.testing.assert_allclose(doubt[2], p.max(0), atol=1e-5)
    assert len(doubt) == 4 and doubt[3].max() > 0


@pytest.mark.parametrize("keys", [{}, {"tiling": {"blend": "gaussian"}}, {"compute": {"tta": "flips"}}])
def test_the_map_does_not_depend_on_blocks(lab: Lab, keys: dict[str, Any]) -> None:
    ref, card = lab.raster(patches(SHAPE)), lab.card(2, **INPUT)
    maps = []
    for out, block in (("one", "auto"), ("two", "24")):
        tiling = {**keys.get("tiling", {}), "block": block}
        scene = prepared(uncertain(lab, out, ref, card, **{**keys, "tiling": tiling}), ref)
        predict(scene)
        maps.append(doubt_of(scene))
    np.testing.assert_array_equal(*maps)
    assert len(maps[0]) == (4 if keys else 3)
    if keys:
        assert maps[0][3].max() > 0  # windows or views that see other borders do not answer alike


def test_asking_for_the_map_later_is_another_run(lab: Lab) -> None:
    ref, card = lab.raster(patches(SHAPE)), lab.card(2, **INPUT)
    without = lab.job(ref, card, "out", scores=True)
    assert check_request(without).fingerprint != check_request(uncertain(lab, "out", ref, card)).fingerprint


def test_labels_are_the_same_with_and_without_the_map(lab: Lab) -> None:
    ref, card = lab.raster(patches(SHAPE)), lab.card(2, **INPUT)
    with_map = prepared(uncertain(lab, "with", ref, card), ref)
    without = prepared(lab.job(ref, card, "without"), ref)
    for scene in (with_map, without):
        predict(scene)
    np.testing.assert_array_equal(labels_of(with_map), labels_of(without))
    assert with_map.predict.key == without.predict.key


def test_means_by_class_calibration_and_the_file(lab: Lab) -> None:
    values = patches(SHAPE)
    values[0, :9, :9] = 0
    ref, card = lab.raster(values, nodata=0), lab.card(2, **INPUT)
    truth = np.random.default_rng(5).integers(0, 3, SHAPE).astype(np.uint8)
    path = lab.raster(truth[None]).uri
    scene = prepared(uncertain(lab, "out", ref, card, reference={"path": path}), ref)
    predict(scene)
    measured, _ = measure_scene(scene)

    labels, shares, valid = labels_of(scene), doubt_of(scene) / LEVELS, values[0] > 0
    found = SceneIntensity("scene", Intensities(measured.regions, measured.doubts, measured.uncertainty))
    classes = [ClassInfo(c.value, c.name, c.color) for c in scene.classes]
    table = uncertainty_table([found], classes).set_index(["class", "channel"])
    for number, channel in enumerate(scene.uncertainty):
        over_all = shares[number][valid].mean()
        np.testing.assert_allclose(table.loc[(ALL_CLASSES, channel), "mean"], over_all, rtol=1e-12)
        for c in scene.classes:
            mean = shares[number][valid & (labels == c.value)].mean()
            np.testing.assert_allclose(table.loc[(c.name, channel), "mean"], mean, rtol=1e-12)
    assert set(table["unit"]) == {"share"}

    assert measured.calibration is not None
    right = labels[valid] == truth[valid]
    sure = torch.from_numpy(shares[2][valid])
    two = torch.stack([sure, torch.zeros_like(sure)], 1)  # the answer's confidence, right or not
    oracle = multiclass_calibration_error(
        two.float(), torch.from_numpy(~right).long(), num_classes=2, n_bins=15, norm="l1", validate_args=False
    )
    np.testing.assert_allclose(measured.calibration.error, float(oracle), atol=1e-5)

    run = RunFolder(str(lab.folder / "out"), "job", "run", "2024-05-06T07:08:09+00:00")
    files = export_scene(scene, measured, run)
    with rasterio.open(Path(run.location) / files["uncertainty"]) as file:
        assert file.descriptions == scene.uncertainty
        written = file.read()
    assert np.isnan(written[:, ~valid]).all()
    np.testing.assert_allclose(written[:, valid], shares[:, valid], atol=1e-7)


# ---------------------------------------------------------------------------------- surfaces


def discs() -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference (1, y, x): two overlapping discs and a square that only one has."""
    y, x = np.mgrid[:90, :110]
    prediction = np.uint8((y - 40) ** 2 + (x - 50) ** 2 < 20**2)
    reference = np.uint8((y - 43) ** 2 + (x - 46) ** 2 < 18**2)
    prediction[70:80, 80:90] = 2
    return prediction[None], reference[None]


def surfaces(lab: Lab, measure: dict[str, Any], **profile: Any) -> tuple[dict[str, Any], Any]:
    """The surfaces of the discs as a labels job, and the rows of their table."""
    prediction, reference = discs()
    scene_file = lab.raster(prediction, **profile)
    job = Job.model_validate(
        {
            "scenes": [scene_file.uri],
            "labels": lab.raster(prediction, **profile).uri,
            "reference": {"path": lab.raster(reference, **profile).uri},
            "measure": {"surface": True, **measure},
            "outputs": {"dir": str(lab.folder / "out")},
        }
    )
    check_request(job)
    scene = prepare_labelled(job, discover(job.scenes)[0])
    measured, _ = measure_scene(scene)
    assert measured.surfaces is not None
    classes = [ClassInfo(v, str(v), "#000000", v == 0) for v in (0, 1, 2)]
    return measured.surfaces, surface_table([SceneSurfaces("scene", measured.surfaces)], classes)


def test_surfaces_of_a_raster_are_monais_in_metres(lab: Lab) -> None:
    transform = rasterio.Affine(5, 0, 500000, 0, -10, 5000000)
    found, table = surfaces(lab, {"tolerance": 12.0, "width": 20.0}, transform=transform)
    prediction, reference = (torch.from_numpy(a == 1)[None] for a in discs())
    assert found["unit"] == "m" and list(table["class"]) == ["1", "2"]
    row = table.iloc[0]
    for percentile, column in ((None, "hausdorff_voxel"), (95, "hd95_voxel")):
        oracle = compute_hausdorff_distance(
            prediction, reference, include_background=True, percentile=percentile, spacing=(10.0, 5.0)
        )
        np.testing.assert_allclose(row[column], float(oracle), rtol=1e-6)
    oracle = compute_surface_dice(prediction, reference, [12.0], include_background=True, spacing=(10.0, 5.0))
    np.testing.assert_allclose(row["surface_dice_voxel"], float(oracle), rtol=1e-6)
    only = table.iloc[1]  # hallucinated
    assert only["state"] == MEASURED and only["reason"] == "not in the reference"
    assert np.isnan(only["hd95_element"]) and only["surface_dice_element"] == 0


def test_where_degrees_are_no_lengths_it_says_so(lab: Lab) -> None:
    transform = rasterio.Affine(0.001, 0, 10, 0, -0.001, 50)
    found, table = surfaces(lab, {}, crs="EPSG:4326", transform=transform)
    assert not found["classes"]
    assert set(table["state"]) == {NOT_DEFINED}
    assert "warp to a projected CRS" in table["reason"].iloc[0]


def test_tolerances_of_given_labels_are_checked_before_work(lab: Lab) -> None:
    values = lab.raster(discs()[0]).uri
    job = {"scenes": [values], "labels": values, "outputs": {"dir": str(lab.folder / "out")}}
    for tolerances, said in (({"1": 2.0}, "a name in the job's `classes`"), ({"1": -2.0}, "greater than 0")):
        with pytest.raises((RequestError, ValueError), match=said):
            check_request(Job.model_validate({**job, "measure": {"surface": True, "tolerances": tolerances}}))


def test_a_tolerance_for_a_class_that_is_not_there(lab: Lab) -> None:
    ref, card = lab.raster(patches(SHAPE)), lab.card(2, **INPUT)
    job = lab.job(ref, card, "out", measure={"surface": True, "tolerances": {"lava": 1.0}})
    with pytest.raises(RequestError, match=r"measure\.tolerances: found 'lava'; valid: "):
        check_request(job)

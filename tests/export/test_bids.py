"""BIDS derivatives of real runs, held against the standard's own validator and the labels they copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from finished import finish
from given import run_all
from world import OBLIQUE, World, nearest_label, write_volume

from segpipe.config.job import Job
from segpipe.export.bids import parse_bids
from segpipe.export.run_folder import RunFolder, check_manifest
from segpipe.store.location import open_store

NAMES = (
    "sub-01/anat/sub-01_acq-high_run-1_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-high_run-1_T2w.nii.gz",  # a segmentation's name has no place for T1w and T2w
    "sub-02/ses-pre/anat/sub-02_ses-pre_FLAIR.nii.gz",
    "sub-02/ses-pre/func/sub-02_ses-pre_task-rest_dir-AP_boldref.nii.gz",
    "sub-03/dwi/sub-03_dir-AP_sbref.nii.gz",
    "sub-03/anat/sub-03_inv-1_MP2RAGE.nii.gz",
    "sub-03/anat/sub-03_inv-2_MP2RAGE.nii.gz",
)


def validated(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What the validator says of a data set: its errors."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "DENO_DIR": str(tmp_path / "deno"),
        "DENO_NO_UPDATE_CHECK": "1",
    }
    said = subprocess.run(
        [str(program), str(folder), "--format", "json"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = json.loads(said.stdout)
    assert found["summary"]["totalFiles"] > 3, said.stdout
    errors = [issue for issue in found["issues"]["issues"] if issue["severity"] == "error"]
    assert (said.returncode == 0) == (not errors), said.stderr
    return errors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bids")
    for number, name in enumerate(NAMES):
        write_volume(root / name, voxels(number))
    write_volume(root / "sub-04.nii.gz", voxels(99))
    return root


def voxels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 240, (9, 8, 7)).astype(np.int16)


def job_file(world: World, source: Path, out: Path) -> Path:
    scenes = [str(source / name) for name in (*NAMES, "sub-04.nii.gz")]
    return world.job(out, card="nearest-volume", scenes=scenes, outputs={"formats": ["bids"]})


@pytest.fixture(scope="module")
def run(world: World, source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finish(job_file(world, source, tmp_path_factory.mktemp("run") / "out"))[0]


def base(run: RunFolder) -> Path:
    return Path(run.location) / "derivatives" / "segpipe-trial"


STEMS = (
    "sub-01/anat/sub-01_acq-high_run-1_desc-nearestVolumeT1w",
    "sub-01/anat/sub-01_acq-high_run-1_desc-nearestVolumeT2w",
    "sub-02/ses-pre/anat/sub-02_ses-pre_desc-nearestVolume",
    "sub-02/ses-pre/func/sub-02_ses-pre_task-rest_dir-AP_desc-nearestVolume",
    "sub-03/dwi/sub-03_dir-AP_desc-nearestVolume",
    "sub-03/anat/sub-03_desc-nearestVolumeInv1MP2RAGE",
    "sub-03/anat/sub-03_desc-nearestVolumeInv2MP2RAGE",
)


def test_the_validator_accepts_them(run: RunFolder, tmp_path: Path) -> None:
    assert validated(base(run), tmp_path) == []
    wrong = base(run) / "sub-01" / "anat" / "sub-01_model-x_dseg.nii.gz"
    wrong.write_bytes((base(run) / f"{STEMS[0]}_dseg.nii.gz").read_bytes())
    try:
        assert validated(base(run), tmp_path) != []  # so it does look at names
    finally:
        wrong.unlink()


def test_every_volume_has_its_labels_under_its_name(run: RunFolder) -> None:
    made = sorted(p.relative_to(base(run)).as_posix() for p in base(run).rglob("*.nii.gz"))
    assert made == sorted(f"{stem}_dseg.nii.gz" for stem in STEMS)
    for number, stem in enumerate(STEMS):
        image = nib.load(base(run) / f"{stem}_dseg.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), nearest_label(voxels(number)))
        assert np.allclose(image.affine, OBLIQUE, atol=1e-5)
        assert (base(run) / f"{stem}_dseg.nii.gz").stat().st_nlink == 2  # written once


def test_sidecars_lead_to_the_source_and_tables_name_the_classes(source: Path, run: RunFolder) -> None:
    about = json.loads((base(run) / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    assert about["GeneratedBy"][0]["Name"] == "segpipe"
    assert about["DatasetLinks"] == {"source": source.as_uri()}
    for name, stem in zip(NAMES, STEMS, strict=True):
        said = json.loads((base(run) / f"{stem}_dseg.json").read_text())
        assert said["Sources"] == [f"bids:source:{name}"]
        table = pd.read_csv(base(run) / f"desc-{stem.rpartition('-')[2]}_dseg.tsv", sep="\t")
        assert table.columns.to_list() == ["index", "name", "color"]
        assert table["index"].to_list() == [0, 1, 2]
        assert table["name"].to_list() == ["ground", "crop", "water"]


def test_a_file_without_a_bids_name_is_done_and_noted(run: RunFolder) -> None:
    record = json.loads((Path(run.location) / "run.json").read_text())
    (plain,) = (s for s in record["scenes"] if s["uri"].endswith("sub-04.nii.gz"))
    assert plain["state"] == "done"
    assert any("no BIDS derivative was written" in note for note in plain["notes"])
    assert sum("BIDS" in note for s in record["scenes"] for note in s["notes"]) == 1
    assert check_manifest(run.location) == []


@pytest.mark.parametrize(
    ("uri", "known"),
    [
        (
            "/d/sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
            ("anat", "/d", "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz"),
        ),
        (
            "/d/sub-1/pet/sub-1_trc-FDG_pet.nii.gz#frame=3",
            ("anat", "/d", "sub-1/pet/sub-1_trc-FDG_pet.nii.gz"),
        ),
        ("/d/sub-1_T1w.nii", ("anat", "/d", "sub-1_T1w.nii")),
        ("/d/T1w.nii.gz", None),
        ("/d/sub-1_T1w.tif", None),
        ("/d/sub-1.nii.gz", None),
    ],
)
def test_names(uri: str, known: tuple[str, str, str] | None) -> None:
    found = parse_bids(uri)
    assert (found and (found.datatype, found.root, found.path)) == known


@pytest.mark.slow
def test_in_a_bucket_files_are_copied_there(world: World, source: Path, bucket: str, tmp_path: Path) -> None:
    path = job_file(world, source, tmp_path / "out")
    job = yaml.safe_load(path.read_text())
    job["outputs"]["dir"], job["scenes"] = f"{bucket}/bids", job["scenes"][:2]
    path.write_text(yaml.safe_dump(job))
    run, _ = finish(path)
    store = open_store(run.location)
    there = {meta["path"] for chunk in store.list() for meta in chunk}
    stem = f"derivatives/segpipe-trial/{STEMS[0]}_dseg"
    assert {f"{stem}.nii.gz", f"{stem}.json", "derivatives/segpipe-trial/dataset_description.json"} <= there
    scene = "sub-01_acq-high_run-1_T1w"
    one, two = (bytes(store.get(p).bytes()) for p in (f"{stem}.nii.gz", f"scenes/{scene}/labels.nii.gz"))
    assert one == two
    assert check_manifest(run.location) == []


def test_voxels_without_data_are_in_the_table(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5) % 2
    write_volume(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz", values)
    labels = values.copy()
    labels[0, 0, 0] = np.nan
    write_volume(tmp_path / "labels/sub-1_T1w.nii.gz", labels)
    job = Job.model_validate(
        {
            "name": "given",
            "scenes": [str(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz")],
            "labels": str(tmp_path / "labels"),
            "outputs": {"dir": str(tmp_path / "out"), "formats": ["bids"]},
        }
    )
    folder, _ = run_all(job)
    made = folder / "derivatives/segpipe-given"
    table = pd.read_csv(made / "desc-given_dseg.tsv", sep="\t")
    image = np.asarray(nib.load(made / "sub-1/anat/sub-1_desc-given_dseg.nii.gz").dataobj)
    assert set(np.unique(image)) == set(table["index"])
    assert table["name"].to_list()[-1] == "no data"
    assert validated(made, tmp_path) == []

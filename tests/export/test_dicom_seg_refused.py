"""Series that a DICOM SEG cannot refer to are refused before work, with what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from world import World

from segpipe.config.card import read_card
from segpipe.config.job import load_job
from segpipe.errors import SceneError
from segpipe.inference.settings import resolve_settings
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.model_scene import dry_plan, prepare_scene
from segpipe.runs.check import check_request
from segpipe.sources import SceneRef
from tests.export.ct_series import CT, needs_ct, volume_card, write_oblique
from tests.given import job_of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"StudyInstanceUID": ""}, r"missing: StudyInstanceUID in 3 of 3 slices"),
        (
            {"SeriesInstanceUID": "", "SOPInstanceUID": "", "FrameOfReferenceUID": ""},
            r"missing: SOPInstanceUID in 3 of 3 slices, SeriesInstanceUID .*, FrameOfReferenceUID in 3",
        ),
        ({"SOPInstanceUID": "1.2.3.4"}, r"SOPInstanceUID 1\.2\.3\.4 in 3 slices; valid: one each"),
        ({"SOPClassUID": "1.2.3.4"}, r"SOPClassUID 1\.2\.3\.4 is none of the standard's"),
    ],
)
def test_a_series_that_cannot_be_referred_to_is_refused_at_planning(
    world: World, tmp_path: Path, written: dict[str, Any], change: dict[str, str], message: str
) -> None:
    write_oblique(tmp_path / "ct", np.full((3, 6, 5), 100), {**written, **change})
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 3), np.uint8), np.eye(4)), tmp_path / "labels.nii.gz")
    outputs = {"dir": str(tmp_path / "out"), "formats": ["dicomseg", "nifti"]}
    given = job_of(tmp_path / "out", tmp_path / "ct", tmp_path / "labels.nii.gz", outputs=outputs)
    job = load_job(
        world.job(tmp_path / "out", card="nearest-volume", scenes=[str(tmp_path / "ct")], outputs=outputs)
    )
    [ref] = check_request(job).scenes
    settings = resolve_settings(job.compute, volume_card(world))
    help_ = r".*leave dicomseg out of outputs\.formats, or give the series its UIDs"
    for prepare in (prepare_scene, dry_plan):
        with pytest.raises(SceneError, match=message + help_):
            prepare(job, read_card(job.model), ref, settings)
    with pytest.raises(SceneError, match=message + help_):
        prepare_labelled(given, ref)
    assert not (tmp_path / "out" / ".store").exists()
    prepare_scene(
        job.model_copy(update={"outputs": job.outputs.model_copy(update={"formats": []})}),
        read_card(job.model_copy(update={"outputs": job.outputs.model_copy(update={"formats": []})}).model),
        ref,
        settings,
    )


def test_slices_of_two_studies_are_refused(tmp_path: Path, written: dict[str, Any]) -> None:
    write_oblique(tmp_path / "ct", np.zeros((3, 4, 4)), written)
    one = dcmread(tmp_path / "ct" / "001.dcm")
    one.StudyInstanceUID = generate_uid()
    one.save_as(tmp_path / "ct" / "001.dcm")
    job = job_of(tmp_path, tmp_path / "ct", "x", outputs={"dir": str(tmp_path), "formats": ["dicomseg"]})
    with pytest.raises(SceneError, match="2 values of StudyInstanceUID; valid: one"):
        prepare_labelled(job, SceneRef("ct", str(tmp_path / "ct")))


@needs_ct
def test_the_anonymised_ct_is_refused_with_the_reason(tmp_path: Path) -> None:
    job = job_of(tmp_path, CT, "x", outputs={"dir": str(tmp_path), "formats": ["dicomseg"]})
    with pytest.raises(SceneError, match=r"dicom: a DICOM SEG needs UIDs; missing: .*in 20 of 20 slices"):
        prepare_labelled(job, SceneRef("ct", str(CT)))

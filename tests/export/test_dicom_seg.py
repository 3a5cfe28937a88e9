"""DICOM SEG read back by highdicom, placed by the formula of PS3.3 C.7.6.2.1.1, against the label map."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid
from world import World, nearest_label

from segpipe.config.card import Class, read_card
from segpipe.config.job import load_job
from segpipe.errors import SceneError
from segpipe.export.dicom_seg import Algorithm, concept_of, write_dicom_seg
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import export_scene
from segpipe.geometry.box import Box
from segpipe.inference.settings import resolve_settings
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.runs.check import check_request
from segpipe.sources.dicom.reader import DicomSource
from tests.export.ct_series import COLUMN, CT, FIRST, ROW, SECRETS, STEP, needs_ct, volume_card, write_oblique
from tests.given import job_of, run_all

CLASSES = (
    Class(value=0, name="background", color="#000000", background=True),
    Class(value=3, name="liver", color="#dd8265", code="SCT:10200004"),
    Class(value=7, name="Knochen, groß", color="#f1d691"),
    Class(value=300, name="tumour", color="#00ff00", code="SCT:108369006"),
    Class(value=301, name="never there", color="#0000ff"),
)
NODATA = 65535
MODEL = Algorithm("abdomen", "card 12, weights 34", automatic=True)


def random_labels(shape: Sequence[int]) -> np.ndarray:
    """Blobs of three classes and of no data; the first two and the last slice are empty of the first."""
    labels = np.random.default_rng(5).choice([0, 3, 7, 300, NODATA], size=tuple(shape))
    labels[:2][labels[:2] == 3] = 0
    labels[-1][labels[-1] == 3] = 7
    return np.asarray(labels)


def write(folder: Path, labels: np.ndarray, path: Path, classes: Sequence[Class] = CLASSES) -> None:
    def read(box: Box, /) -> np.ndarray:
        return np.asarray(labels[box.slices])

    source = DicomSource(str(folder))
    with source:
        write_dicom_seg(read, source, classes, NODATA, MODEL, path)


def assert_same_by_instance(path: Path, instances: Sequence[str], labels: np.ndarray) -> None:
    """Each segment of each source instance holds what the label map holds in that slice."""
    seg = hd.seg.segread(path)
    found = seg.get_pixels_by_source_instance(list(instances), assert_missing_frames_are_empty=True)
    values = [c.value for c in CLASSES if not c.background]
    assert found.shape == (*labels.shape, len(values))
    for n, value in enumerate(values):
        np.testing.assert_array_equal(found[..., n], labels == value)


def test_an_oblique_series_in_shuffled_files_gets_each_label_in_its_place(
    tmp_path: Path, written: dict[str, Any]
) -> None:
    """Rows of 6 and columns of 5 elements, pixels of 0.8 x 0.5 mm, 30 bits a frame: not a whole byte."""
    shape = (7, 6, 5)
    instances = write_oblique(tmp_path / "ct", np.arange(210).reshape(shape), written)
    labels = random_labels(shape)
    write(tmp_path / "ct", labels, tmp_path / "labels.dcm")
    assert_same_by_instance(tmp_path / "labels.dcm", instances, labels)

    volume = hd.seg.segread(tmp_path / "labels.dcm").get_volume()
    for n, value in enumerate((3, 7, 300)):
        for z, y, x in np.argwhere(labels == value):
            lps = FIRST + STEP * z * np.cross(ROW, COLUMN) + ROW * 0.5 * x + COLUMN * 0.8 * y
            at = volume.map_reference_to_indices(lps[np.newaxis], round_output=True, check_bounds=True)[0]
            assert volume.array[(*at, n)] == 1
        assert volume.array[..., n].sum() == (labels == value).sum() > 0
    assert volume.array[..., 3].sum() == 0
    assert volume.spacing == pytest.approx((STEP, 0.8, 0.5))


def test_a_tilted_gantry_keeps_the_place_of_every_slice(tmp_path: Path, written: dict[str, Any]) -> None:
    """No volume can be made of such frames; each says its own position."""
    shape = (4, 6, 5)
    instances = write_oblique(tmp_path / "ct", np.zeros(shape), written, tilt=0.7)
    labels = random_labels(shape)
    write(tmp_path / "ct", labels, tmp_path / "labels.dcm")
    assert_same_by_instance(tmp_path / "labels.dcm", instances, labels)
    seg = hd.seg.segread(tmp_path / "labels.dcm")
    assert float(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices) == STEP
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        k = instances.index(source)
        expected = FIRST + STEP * k * np.cross(ROW, COLUMN) + 0.7 * k * COLUMN
        found = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_what_the_file_says_of_itself(tmp_path: Path, written: dict[str, Any]) -> None:
    instances = write_oblique(tmp_path / "ct", np.zeros((3, 6, 5)), written)
    write(tmp_path / "ct", random_labels((3, 6, 5)), tmp_path / "labels.dcm")
    seg = hd.seg.segread(tmp_path / "labels.dcm")
    assert (seg.SegmentationType, seg.Modality) == (hd.seg.SegmentationTypeValues.BINARY.value, "SEG")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == written[keyword]
    assert seg.SeriesInstanceUID != written["SeriesInstanceUID"]
    [series] = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == written["SeriesInstanceUID"]
    found = [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence]
    assert sorted(found) == sorted(instances)
    assert (seg.SeriesNumber, float(_measures(seg).SliceThickness)) == (1004, 9)

    names = ["liver", "Knochen, groß", "tumour", "never there"]
    described = [seg.get_segment_description(n) for n in (1, 2, 3, 4)]
    assert [d.SegmentLabel for d in described] == names
    assert described[2].SegmentDescription == "value 300 in label maps"
    liver = described[0]
    assert liver.segmented_property_type == hd.sr.CodedConcept("10200004", "SCT", "liver")
    assert liver.segmented_property_category.value == "91723000"
    assert liver.segmented_property_type.scheme_designator == "SCT"
    assert liver.SegmentAlgorithmType == "AUTOMATIC"
    [algorithm] = liver.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (MODEL.name, MODEL.version)
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    # CIELab of #dd8265 under D65 is about L 63.2, a 31.2, b 29.5 (PS3.3 C.10.7.1.1: 0…100 and −128…127).
    lightness, a, b = (int(v) for v in liver.RecommendedDisplayCIELabValue)
    lab = (lightness / 65535 * 100, a / 65535 * 255 - 128, b / 65535 * 255 - 128)
    np.testing.assert_allclose(lab, (63.2, 31.2, 29.5), atol=2.5)


def _measures(seg: Dataset) -> Any:
    return seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def test_codes_are_the_cards_with_the_standards_category_or_private() -> None:
    """Of SNOMED: a liver, a neoplasm, fat, gas, and the head of a hippocampus, which is in no list."""
    expected = {
        "SCT:10200004": "Anatomical Structure",
        "SCT:108369006": "Morphologically Abnormal Structure",
        "SCT:55603005": "Tissue",
        "SCT:74947009": "Body Substance",
        "SCT:279307001": "Anatomical Structure",
    }
    for code, category in expected.items():
        found = concept_of(Class(value=1, name="x", color="#000000", code=code))
        assert (found[0].meaning, f"{found[1].scheme_designator}:{found[1].value}") == (category, code)
    plain = [concept_of(Class(value=v, name=n, color="#000000")) for v, n in ((1, "a"), (2, "a"), (3, "b"))]
    assert {c.scheme_designator for pair in plain for c in pair} == {"99SEGPIPE"}
    assert plain[0][1].value == plain[1][1].value != plain[2][1].value
    assert [pair[1].meaning for pair in plain] == ["a", "a", "b"]


def test_the_patient_is_in_the_file_and_in_no_message(
    tmp_path: Path, written: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A Latin-1 name becomes UTF-8, for classes have names too; a birth date that is none stays as it is."""
    write_oblique(tmp_path / "ct", np.zeros((3, 6, 5)), written)
    caplog.clear()  # the writer of the series has told what is wrong with it
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        write(tmp_path / "ct", random_labels((3, 6, 5)), tmp_path / "labels.dcm")
    said = caplog.text + "".join(str(w.message) for w in warned)
    assert not [line for line in said.splitlines() if any(s in line for s in SECRETS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = dcmread(tmp_path / "labels.dcm", stop_before_pixels=True)
        tags = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "PatientSex")
        found = [str(header[tag].value) for tag in tags]
        assert found == list(SECRETS)
        assert header.StudyDate == "20240102"


def test_no_element_of_any_segment_is_a_file_with_empty_frames(
    tmp_path: Path, written: dict[str, Any]
) -> None:
    instances = write_oblique(tmp_path / "ct", np.zeros((3, 6, 5)), written)
    labels = np.zeros((3, 6, 5), dtype=np.int64)
    write(tmp_path / "ct", labels, tmp_path / "labels.dcm")
    assert_same_by_instance(tmp_path / "labels.dcm", instances, labels)


@pytest.mark.slow
def test_more_than_255_segments(tmp_path: Path, written: dict[str, Any]) -> None:
    instances = write_oblique(tmp_path / "ct", np.zeros((2, 16, 20)), written)
    labels = np.arange(640).reshape(2, 16, 20) % 320
    ground = Class(value=0, name="background", color="#000000", background=True)
    classes = [ground, *(Class(value=v, name=str(v), color="#ffffff") for v in range(1, 320))]
    write(tmp_path / "ct", labels, tmp_path / "labels.dcm", classes)
    found = hd.seg.segread(tmp_path / "labels.dcm").get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("value", [-1, 2, 400])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, written: dict[str, Any], value: int) -> None:
    write_oblique(tmp_path / "ct", np.zeros((2, 4, 4)), written)
    labels = np.zeros((2, 4, 4), dtype=np.int64)
    labels[1, 2, 3] = value
    with pytest.raises(SceneError, match=rf"a label .* is {value}; valid: 0, 3, 7, 300, 301, 65535"):
        write(tmp_path / "ct", labels, tmp_path / "labels.dcm")
    assert [p.name for p in tmp_path.iterdir()] == ["ct"]


@needs_ct
def test_a_real_ct_with_fresh_uids(tmp_path: Path, written: dict[str, Any]) -> None:
    """Labels are thresholds of what pydicom decodes, slices sorted here by their z."""
    folder = tmp_path / "ct"
    folder.mkdir()
    slices = []
    for n, path in enumerate(sorted(CT.iterdir(), reverse=True)):
        ds = dcmread(path)
        for keyword, value in written.items():
            setattr(ds, keyword, value)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(folder / f"{n * 7 % 20:02d}.dcm")
        slices.append(ds)
    slices.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    hounsfield = np.stack([d.pixel_array for d in slices]).astype(np.int32) - 1024
    labels = np.digitize(hounsfield, [-200, 150, 400])
    labels = np.array([0, 3, 7, 300])[labels]
    write(folder, labels, tmp_path / "labels.dcm")
    assert_same_by_instance(tmp_path / "labels.dcm", [d.SOPInstanceUID for d in slices], labels)

    volume = hd.seg.segread(tmp_path / "labels.dcm").get_volume(combine_segments=True, relabel=False)
    source = hd.get_volume_from_series(slices)
    aligned = volume.match_geometry(source)
    np.testing.assert_array_equal(aligned.array, np.digitize(source.array, [-200, 150, 400]))
    z, y, x = (int(v) for v in np.argwhere(labels == 300)[100])
    marker = np.array(slices[z].ImagePositionPatient, float) + np.array([x, y, 0]) * 0.9765625
    at = volume.map_reference_to_indices(marker[np.newaxis], round_output=True)[0]
    assert volume.array[tuple(at)] == 3
    frames = int(hd.seg.segread(tmp_path / "labels.dcm").NumberOfFrames)
    assert frames == sum((plane == v).any() for plane in labels for v in (3, 7, 300))


def test_a_run_of_a_model_writes_it_beside_the_other_formats(
    world: World, tmp_path: Path, written: dict[str, Any]
) -> None:
    volume = world.voxels()
    instances = write_oblique(tmp_path / "ct", volume, written)
    formats = {"formats": ["dicomseg", "nifti"]}
    path = world.job(tmp_path / "out", card="nearest-volume", scenes=[str(tmp_path / "ct")], outputs=formats)
    job = load_job(path)
    [ref] = check_request(job).scenes
    scene = create_stages(
        prepare_scene(job, read_card(job.model), ref, resolve_settings(job.compute, volume_card(world)))
    )
    predict_blocks(scene, pending_blocks(scene))
    measured, _ = measure_scene(scene)
    run = RunFolder(job.outputs.dir, job.name, "run-1", "2024-05-06T07:08:09+00:00")
    files = export_scene(scene, measured, run)
    assert files["dicomseg"] == f"scenes/{ref.name}/labels.dcm"
    seg = hd.seg.segread(Path(run.location) / files["dicomseg"])
    found = seg.get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found, nearest_label(volume))
    nifti = nib.load(Path(run.location) / files["labels"])
    np.testing.assert_array_equal(np.asarray(nifti.dataobj).T, found)  # type: ignore[attr-defined]
    assert seg.ManufacturerModelName == "nearest-volume"
    before = (Path(run.location) / files["dicomseg"]).stat().st_mtime_ns
    assert export_scene(scene, measured, run) == files
    assert (Path(run.location) / files["dicomseg"]).stat().st_mtime_ns == before


def test_labels_that_are_given_and_scenes_that_are_not_dicom(tmp_path: Path, written: dict[str, Any]) -> None:
    """A NIfTI of labels on a DICOM scene gets the file; on a NIfTI scene the format is skipped."""
    shape = (5, 6, 4)
    instances = write_oblique(tmp_path / "ct", np.zeros(shape), written)
    affine = DicomSource(str(tmp_path / "ct")).geometry.matrix
    labels = np.random.default_rng(1).integers(0, 3, shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels.T, affine), tmp_path / "labels.nii.gz")
    outputs = {"dir": str(tmp_path / "out"), "formats": ["dicomseg"]}
    job = job_of(tmp_path / "out", tmp_path / "ct", tmp_path / "labels.nii.gz", outputs=outputs)
    folder, _ = run_all(job)
    seg = hd.seg.segread(folder / "scenes" / "ct" / "labels.dcm")
    found = seg.get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found, labels)
    assert seg.get_segment_description(1).SegmentAlgorithmType == "SEMIAUTOMATIC"

    shutil.copy(tmp_path / "labels.nii.gz", tmp_path / "scene.nii.gz")
    folder, _ = run_all(job_of(tmp_path / "o", tmp_path / "scene.nii.gz", tmp_path / "labels.nii.gz",
                               outputs={**outputs, "dir": str(tmp_path / "o")}))  # fmt: skip
    assert [p.name for p in (folder / "scenes").rglob("labels*")] == []

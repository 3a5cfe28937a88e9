"""Medical trees: images by their BIDS names, DICOM series by their UIDs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from segpipe.config.scan import Lake
from segpipe.errors import SceneError
from segpipe.lake.entry import LakeEntry
from segpipe.lake.listing import list_lake
from segpipe.sources import open_source

BIDS = [
    "dataset_description.json", "participants.tsv",
    "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.json", "sub-01/anat/sub-01_FLAIR.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_acq-hi_run-1_T1w.nii", "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii", "sub-02/ses-b/func/sub-02_ses-b_task-x_bold.nii.gz",
    "sub-02/ses-b/anat/sub-03_ses-b_T1w.nii.gz", "sub-02/ses-b/anat/.sub-02_ses-b_T1w.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_desc_T1w.nii.gz",
    "derivatives/tool/sub-01/anat/sub-01_T1w.nii.gz", "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
]  # fmt: skip


def _all(location: Path, kind: str, **fields: Any) -> list[LakeEntry]:
    return list(list_lake(Lake.model_validate({"location": str(location), "kind": kind, **fields})))


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["sub-01_T1w", "sub-02_ses-a_acq-hi_run-1_T1w", "sub-02_ses-b_T1w"]),
        ({"suffix": "bold"}, ["sub-02_ses-b_task-x_bold"]),
        ({"suffix": "FLAIR", "datatype": "anat"}, ["sub-01_FLAIR"]),
        ({"datatype": "func"}, []),
        ({"subjects": ["02"]}, ["sub-02_ses-a_acq-hi_run-1_T1w", "sub-02_ses-b_T1w"]),
        ({"sessions": ["b"]}, ["sub-02_ses-b_T1w"]),
    ],
)
def test_images_of_a_bids_tree(tmp_path: Path, wanted: dict[str, Any], names: list[str]) -> None:
    for name in BIDS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found = _all(tmp_path, "bids", bids=wanted)
    assert [f.name for f in found] == names
    for scene in found:
        path = Path(scene.uri)
        assert path.name.startswith(f"{scene.name}.nii")
        status = path.stat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        assert scene.identity == {"files": [[scene.uri, status.st_size, *times]]}
    derived = _all(tmp_path / "derivatives" / "tool", "bids")
    assert [f.uri for f in derived] == [f"{tmp_path}/derivatives/tool/sub-01/anat/sub-01_T1w.nii.gz"]


def _series(folder: Path, volume: np.ndarray, **tags: Any) -> list[Path]:
    """Write a volume (z, y, x) as slices 2 mm apart with pixels of 0.8 x 0.5 mm."""
    paths = []
    for k, plane in enumerate(volume):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID, ds.Modality = "Secret^Person", "SECRET-4711", "CT"
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.1", "1.2.3.9"
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelSpacing, ds.ImageOrientationPatient = [0.8, 0.5], [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0.0, 0.0, 2.0 * k]
        ds.PixelData = plane.astype(np.uint16).tobytes()
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        path = folder / f"{len(list(folder.glob('*'))):03d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, (3, 4, 6), dtype=np.uint16)


def test_a_folder_of_one_series_is_the_scene(tmp_path: Path) -> None:
    files = _series(tmp_path / "p1" / "ct", _volume(0))
    (tmp_path / "p1" / "ct" / "notes.txt").write_text("no slice")
    _series(tmp_path / "p2", _volume(1))
    _series(tmp_path / "p2" / "seg", np.zeros((1, 4, 6)), Modality="SEG")
    found = _all(tmp_path, "dicom")
    assert [(f.name, f.uri) for f in found] == [
        ("p1__ct", f"{tmp_path}/p1/ct"),
        ("p2", f"{tmp_path}/p2"),
    ]
    assert found[0].size == sum(p.stat().st_size for p in files)
    assert found[0].modified is not None
    newest = max(p.stat().st_mtime for p in files)
    assert found[0].modified.timestamp() == pytest.approx(newest, abs=1e-5)
    with open_source(found[0].uri) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0], _volume(0))
        assert source.geometry.spacing == (2.0, 0.8, 0.5)
    assert "Secret" not in repr(found)
    assert "4711" not in repr(found)

    (tmp_path / "p1" / "ct" / "notes.txt").write_text("still no slice")
    assert _all(tmp_path, "dicom") == found
    os.utime(files[1], ns=(0, files[1].stat().st_mtime_ns - 10**9))
    changed, other = _all(tmp_path, "dicom")
    assert (changed.name, changed.digest == found[0].digest, other) == ("p1__ct", False, found[1])


def test_several_series_in_one_folder_are_scenes_of_their_own(tmp_path: Path) -> None:
    """Two series, of which the second has two frames of reference, and slices without any UID."""
    folder = tmp_path / "all"
    _series(folder, _volume(0))
    _series(folder, _volume(1), SeriesInstanceUID="1.2.3.2", FrameOfReferenceUID="1.2.3.8")
    _series(folder, _volume(2), SeriesInstanceUID="1.2.3.2", FrameOfReferenceUID="1.2.3.7")
    _series(folder, _volume(3), SeriesInstanceUID="", FrameOfReferenceUID="")
    found = _all(tmp_path, "dicom")
    expected = {"": 3, "1.2.3.1": 0, "1.2.3.2@1.2.3.7": 2, "1.2.3.2@1.2.3.8": 1}
    assert [f.uri for f in found] == [f"{folder}#series={series}" for series in expected]
    assert len({f.name for f in found}) == len({f.digest for f in found}) == 4
    for scene, seed in zip(found, expected.values(), strict=True):
        assert scene.name.startswith("all__")
        with open_source(scene.uri) as source:
            np.testing.assert_array_equal(source.read(source.geometry.box).values[0], _volume(seed))
            assert len(source.identity["files"]) == 3
            assert source.uri == scene.uri


def test_a_damaged_file_fails_its_folder_not_the_listing(tmp_path: Path) -> None:
    _series(tmp_path / "a", _volume(0))
    (tmp_path / "a" / "zzz.dcm").write_bytes(b"rubbish")
    _series(tmp_path / "b", _volume(1))
    damaged, sound = _all(tmp_path, "dicom")
    assert (damaged.uri, sound.uri) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert damaged.identity["count"] == 4
    with pytest.raises(SceneError, match=r"zzz\.dcm: cannot be read as DICOM"):
        open_source(damaged.uri)


def test_the_location_itself_may_be_the_series(tmp_path: Path) -> None:
    _series(tmp_path / "ct", _volume(0))
    assert [(f.name, f.uri) for f in _all(tmp_path / "ct", "dicom")] == [("ct", f"{tmp_path}/ct")]
    (tmp_path / "empty").mkdir()
    assert _all(tmp_path / "empty", "dicom") == []

"""Label maps as NIfTI: values, affine, codes, bytes, no text of the source, flat memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.nifti import write_nifti, write_nifti_scores
from segpipe.export.staging import SLAB_BYTES
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry, volume_geometry

ROOT = Path(__file__).parents[2]
CT = ROOT.parent / "shared" / "data" / "totalsegmentator_ct" / "example_ct_sm.nii.gz"
NIBABEL = Path(nib.__file__).parent / "tests" / "data"
CLASSES = [
    Class(value=0, name="background", color="#000000", background=True),
    Class(value=117, name="upper  rib", color="#ff8000"),
]


def labels_of(shape: tuple[int, ...], value: int = 117) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) < 0.3).astype(np.uint8) * np.uint8(value)


def source_geometry(path: Path) -> VolumeGeometry:
    image = nib.load(path)
    return volume_geometry(image.shape[2::-1], image.affine)


@pytest.mark.parametrize(
    "source",
    [
        NIBABEL / "anatomical.nii",
        NIBABEL / "example4d.nii.gz",
        NIBABEL / "resampled_anat_moved.nii",
        NIBABEL / "reoriented_anat_moved.nii",
        NIBABEL / "example_nifti2.nii.gz",
        NIBABEL / "nifti1.hdr",
        CT,
    ],
    ids=lambda p: p.name,
)
def test_lies_exactly_over_its_source(tmp_path: Path, source: Path) -> None:
    if not source.exists():
        pytest.skip(f"{source} is not here")
    place = source_geometry(source)
    labels = labels_of(place.shape)
    write_nifti(lambda box: labels[box.slices], place, source, CLASSES, None, tmp_path / "l.nii.gz")
    image, original = nib.load(tmp_path / "l.nii.gz"), nib.load(source)
    assert image.shape == original.shape[:3]
    assert np.array_equal(image.affine, original.affine)
    assert np.array_equal(np.asarray(image.dataobj), labels.T)
    assert image.get_data_dtype() == np.uint8
    for field in ("sform_code", "qform_code", "srow_x", "quatern_b", "qoffset_z"):
        assert np.array_equal(image.header[field], original.header[field]), field
    assert np.array_equal(image.header["pixdim"][:4], original.header["pixdim"][:4])
    assert image.header["sizeof_hdr"] == original.header["sizeof_hdr"]


def test_header_says_label(tmp_path: Path) -> None:
    place = volume_geometry((3, 4, 5), np.diag([1.0, 2.0, 3.0, 1.0]))
    labels = labels_of(place.shape)
    write_nifti(lambda box: labels[box.slices], place, None, CLASSES, None, tmp_path / "l.nii")
    with (tmp_path / "l.nii").open("rb") as file:
        header = nib.Nifti1Header.from_fileobj(file)
    assert header.get_intent()[0] == "label"
    assert (header["cal_max"], header.get_slope_inter()) == (117, (1.0, 0.0))
    assert (header["sform_code"], header["qform_code"]) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    assert (tmp_path / "l.ctbl").read_text().splitlines()[-1] == "117 upper_rib 255 128 0 255"


def test_shear_goes_into_the_sform_alone(tmp_path: Path) -> None:
    affine = np.array([[1, 0.3, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    place = volume_geometry((3, 4, 5), affine)
    labels = labels_of(place.shape)
    write_nifti(lambda box: labels[box.slices], place, None, CLASSES, None, tmp_path / "l.nii.gz")
    image = nib.load(tmp_path / "l.nii.gz")
    assert np.allclose(image.affine, affine, atol=1e-6)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 0)


def test_no_text_of_the_source_is_copied(tmp_path: Path) -> None:
    secret = nib.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.eye(4))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        secret.header[field] = b"Jane Doe"
    secret.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, 1971"))
    nib.save(secret, tmp_path / "s.nii.gz")
    labels = labels_of((3, 4, 5))
    place = source_geometry(tmp_path / "s.nii.gz")
    write_nifti(
        lambda box: labels[box.slices], place, tmp_path / "s.nii.gz", CLASSES, None, tmp_path / "l.nii"
    )
    assert b"Jane" in nib.load(tmp_path / "s.nii.gz").header.binaryblock
    assert b"Jane" not in (tmp_path / "l.nii").read_bytes()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    labels = labels_of((9, 30, 40))
    place = volume_geometry(labels.shape, np.eye(4))
    for name in ("first", "second"):
        write_nifti(
            lambda box: labels[box.slices], place, None, CLASSES, None, tmp_path / name / f"{name}.nii.gz"
        )
    first, second = (
        (tmp_path / n / f"{n}{s}").read_bytes() for n, s in (("first", ".nii.gz"), ("second", ".nii.gz"))
    )
    assert first == second
    assert first[4:8] == bytes(4)  # gzip's time


def test_wide_values_are_uint16(tmp_path: Path) -> None:
    classes = [*CLASSES, Class(value=300, name="far", color="#00ff00")]
    labels = np.array([[[0, 300, 117]]], dtype=np.uint16)
    place = volume_geometry(labels.shape, np.eye(4))
    write_nifti(lambda box: labels[box.slices], place, None, classes, None, tmp_path / "l.nii.gz")
    image = nib.load(tmp_path / "l.nii.gz")
    assert image.get_data_dtype() == np.uint16
    assert np.asarray(image.dataobj).ravel().tolist() == [0, 300, 117]


def test_another_affine_than_the_source_is_refused(tmp_path: Path) -> None:
    place = source_geometry(NIBABEL / "anatomical.nii")
    moved = volume_geometry(place.shape, place.matrix + np.eye(4) * 0.5)
    with pytest.raises(SceneError, match="cannot be kept"):
        write_nifti(
            lambda box: np.zeros(box.shape, np.uint8),
            moved, NIBABEL / "anatomical.nii", CLASSES, None, tmp_path / "l.nii.gz",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_reads_are_whole_slabs_in_order(tmp_path: Path) -> None:
    shape = (2 * SLAB_BYTES // 1024**2 + 1, 1024, 1024)
    reads: list[Box] = []

    def read(box: Box) -> np.ndarray:
        reads.append(box)
        return np.zeros(box.shape, np.uint8)

    write_nifti(read, volume_geometry(shape, np.eye(4)), None, CLASSES, None, tmp_path / "l.nii.gz")
    assert [b.start[0] for b in reads] == [0, 16, 32]
    assert all(b.size <= SLAB_BYTES and b.shape[1:] == shape[1:] for b in reads)


def test_scores(tmp_path: Path) -> None:
    scores = np.random.default_rng(2).random((2, 6, 5, 4)).astype(np.float32)
    place = volume_geometry((6, 5, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    write_nifti_scores(
        lambda box: scores[(slice(None), *box.slices)], place, None, CLASSES, tmp_path / "s.nii.gz"
    )
    image = nib.load(tmp_path / "s.nii.gz")
    assert image.shape == (4, 5, 6, 2)
    assert np.array_equal(np.asarray(image.dataobj), scores.transpose(3, 2, 1, 0))
    assert np.array_equal(image.affine, place.matrix)


PROGRAM = """
import resource, sys
import numpy as np
from pathlib import Path
from segpipe.export.nifti import write_nifti
from segpipe.geometry.geometry import volume_geometry
from segpipe.config.card import Class
depth, path = int(sys.argv[1]), Path(sys.argv[2])
classes = [Class(value=v, name=str(v), color="#112233") for v in (0, 1)]
place = volume_geometry((depth, 512, 512), np.eye(4))
write_nifti(lambda box: np.ones(box.shape, np.uint8), place, None, classes, None, path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_flat_in_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (100, 1500):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(depth), str(tmp_path / f"{depth}.nii.gz")],
            capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40, f"peak RSS in MiB: {peaks}"

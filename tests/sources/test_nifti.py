"""A NIfTI volume is read by slices as it is stored, with its affine whole."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.sources import Scaling, Source, open_source

Find = Callable[[str], Path]
Noise = Callable[..., np.ndarray]

OBLIQUE = np.array([[1.9, 0.1, 0.3, -40], [-0.2, 1.8, 0.5, -50], [0.1, -0.4, 2.9, -60], [0, 0, 0, 1]])


def _geometry(source: Source) -> VolumeGeometry:
    assert isinstance(source.geometry, VolumeGeometry)
    return source.geometry


def _real(source: Source) -> np.ndarray:
    """The scaled values of the whole scene, on (i, j, k)."""
    scaling = source.scaling[0]
    values = source.read(source.geometry.box).values[0].T
    return values.astype(np.float64) * scaling.scale + scaling.offset


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("anatomical.nii", None),
        ("reoriented_anat_moved.nii", None),
        ("resampled_anat_moved.nii", None),
        ("standard.nii.gz", None),
        ("example4d.nii.gz", 1),
        ("example_nifti2.nii.gz", 1),
        ("functional.nii", 7),
    ],
)
def test_nibabels_own_files_read_as_nibabel_reads_them(
    name: str, frame: int | None, nibabel_file: Find
) -> None:
    path = nibabel_file(name)
    image = nib.load(path)
    expected = image.get_fdata()
    with open_source(str(path) if frame is None else f"{path}#frame={frame}") as source:
        expected = expected if frame is None else expected[..., frame]
        np.testing.assert_array_equal(_geometry(source).matrix, image.affine)
        assert source.geometry.shape == expected.shape[::-1]
        np.testing.assert_allclose(_real(source), expected, rtol=1e-12)
        assert source.dtype.isnative, "big-endian files are read in the machine's order"


def test_ct_of_3_mm(shared: Find) -> None:
    path = shared("totalsegmentator_ct/example_ct.nii.gz")
    with open_source(str(path)) as source:
        assert _geometry(source).spacing == (3.0, 3.0, 3.0)
        assert (source.geometry.shape, source.dtype) == ((112, 101, 122), np.int32)
        np.testing.assert_array_equal(_real(source), nib.load(path).get_fdata())
        assert source.scaling == (Scaling(),)


def test_hippocampus_volumes_open_without_a_complaint(shared: Find) -> None:
    for path in sorted(shared("msd_hippocampus/images").glob("*.nii.gz"))[:5]:
        with open_source(str(path)) as source:
            np.testing.assert_array_equal(_real(source), nib.load(path).get_fdata())
            assert _geometry(source).orientation == "RAS"


def test_slope_and_intercept_are_declared_not_applied(tmp_path: Path) -> None:
    stored = np.arange(24, dtype="int16").reshape(2, 3, 4)
    path = _raw_nifti(tmp_path / "a.nii", stored, slope=0.5, inter=-3.0)
    with open_source(str(path)) as source:
        assert source.scaling == (Scaling(0.5, -3.0),)
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0].T, stored)
        np.testing.assert_array_equal(_real(source), nib.load(path).get_fdata())


@pytest.mark.parametrize(("slope", "inter"), [(0.0, 5.0), (np.nan, 5.0), (np.nan, np.nan)])
def test_slope_zero_or_nan_means_as_stored(slope: float, inter: float, tmp_path: Path) -> None:
    stored = np.arange(24, dtype="int16").reshape(2, 3, 4)
    path = _raw_nifti(tmp_path / "a.nii", stored, slope=slope, inter=inter)
    with open_source(str(path)) as source:
        assert source.scaling == (Scaling(),)
        np.testing.assert_array_equal(_real(source), stored)


def test_large_label_ids_are_not_cast(tmp_path: Path) -> None:
    """2**24 + 1 is no float32."""
    stored = np.array([[[2**24, 2**24 + 1, 2**31 - 1]]], dtype="int32")
    path = _raw_nifti(tmp_path / "a.nii", stored)
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0].T, stored)


def test_oblique_and_sheared_affines_stay_whole(tmp_path: Path, noise: Noise) -> None:
    sheared = OBLIQUE.copy()
    sheared[0, 2] += 0.7
    for affine in (OBLIQUE, sheared):
        image = nib.Nifti1Image(noise((4, 5, 6), "int16"), None)
        image.set_sform(affine, code=1)
        nib.save(image, tmp_path / "a.nii")
        with open_source(str(tmp_path / "a.nii")) as source:
            stored = affine.astype(np.float32).astype(np.float64)  # as the header holds it
            np.testing.assert_array_equal(_geometry(source).matrix, stored)


def test_qform_serves_where_there_is_no_sform_and_differences_are_noted(tmp_path: Path, noise: Noise) -> None:
    image = nib.Nifti1Image(noise((4, 5, 6), "int16"), None)
    image.set_sform(None, code=0)
    image.set_qform(np.diag([2.0, 3.0, 4.0, 1.0]), code=1)
    nib.save(image, tmp_path / "q.nii")
    assert open_source(str(tmp_path / "q.nii")).geometry.spacing == (4.0, 3.0, 2.0)
    image.set_sform(np.diag([2.0, 3.0, 5.0, 1.0]), code=2)
    nib.save(image, tmp_path / "both.nii")
    with open_source(str(tmp_path / "both.nii")) as source:
        assert source.geometry.spacing == (5.0, 3.0, 2.0)
        assert "sform and qform differ: the sform is used" in source.notes


def test_assumed_orientation_is_noted(tmp_path: Path, noise: Noise) -> None:
    image = nib.Nifti1Image(noise((4, 5, 6), "int16"), None)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    assert any("codes are both 0" in n for n in open_source(str(tmp_path / "a.nii")).notes)


def test_lengths_in_microns_are_refused_not_taken_as_mm(tmp_path: Path, noise: Noise) -> None:
    image = nib.Nifti1Image(noise((4, 5, 6), "int16"), np.eye(4))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(SceneError, match=r"lengths are in micron; .* rewrite it"):
        open_source(str(tmp_path / "a.nii"))


def test_singular_affine_is_refused(tmp_path: Path, noise: Noise) -> None:
    image = nib.Nifti1Image(noise((4, 5, 6), "int16"), None)
    image.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(SceneError, match="its affine gives voxels no volume"):
        open_source(str(tmp_path / "a.nii"))


def test_a_4d_file_needs_a_frame_and_says_how(nibabel_file: Find) -> None:
    path = nibabel_file("example4d.nii.gz")
    with pytest.raises(SceneError, match=r"holds 2 frames; choose one with .*#frame=N, N from 0"):
        open_source(str(path))
    with pytest.raises(SceneError, match="no frame 2; it holds 2, counted from 0"):
        open_source(f"{path}#frame=2")
    with pytest.raises(RequestError, match=r"expected #frame=N .* found 'first'"):
        open_source(f"{path}#frame=first")


def test_frames_are_different_scenes(nibabel_file: Find) -> None:
    path = nibabel_file("example4d.nii.gz")
    first, second = (open_source(f"{path}#frame={n}") for n in (0, 1))
    assert first.identity != second.identity
    assert (_real(first) != _real(second)).any()


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_axes_of_length_one_do_no_harm(shape: tuple[int, ...], tmp_path: Path, noise: Noise) -> None:
    stored = noise(shape, "int16")
    path = _raw_nifti(tmp_path / "a.nii", stored)
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(_real(source), stored.reshape(4, 5, 6))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2, 3), (4, 5, 6, 1, 3)])
def test_other_dimensions_are_refused(shape: tuple[int, ...], tmp_path: Path, noise: Noise) -> None:
    path = _raw_nifti(tmp_path / "a.nii", noise(shape, "int16"))
    with pytest.raises(SceneError, match="expected a 3D volume"):
        open_source(str(path))


def test_colour_and_complex_voxels_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((2, 3, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for stored, message in ((rgb, "colour voxels"), (np.zeros((2, 3, 4), "c8"), "of complex64")):
        nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
        with pytest.raises(SceneError, match=message):
            open_source(str(tmp_path / "a.nii"))


def test_voxels_that_are_not_finite_are_invalid(tmp_path: Path) -> None:
    stored = np.ones((2, 3, 4), dtype="float32")
    stored[0, 1, 2], stored[1, 2, 3] = np.nan, np.inf
    nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
    valid = open_source(str(tmp_path / "a.nii")).read(Box((0, 0, 0), (4, 3, 2))).valid
    assert np.argwhere(~valid).tolist() == [[2, 1, 0], [3, 2, 1]]


@pytest.mark.parametrize("opened", ["a.img", "a.hdr"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Spm99AnalyzeImage, nib.AnalyzeImage])
def test_pairs_open_by_either_file(
    kind: type[nib.AnalyzeImage], opened: str, tmp_path: Path, noise: Noise
) -> None:
    stored = noise((4, 5, 6), "int16")
    nib.save(kind(stored, np.diag([-2.0, 2.0, 3.0, 1.0])), tmp_path / "a.img")
    with open_source(str(tmp_path / opened)) as source:
        np.testing.assert_array_equal(_real(source), stored)
        np.testing.assert_array_equal(_geometry(source).matrix, nib.load(tmp_path / "a.img").affine)
        files = [Path(f["uri"]).name for f in source.identity["files"]]
        assert {"a.hdr", "a.img"} <= set(files)
        assert any("Analyze" in n for n in source.notes) is not (kind is nib.Nifti1Pair)


def test_reading_forward_never_starts_again(tmp_path: Path, noise: Noise) -> None:
    """Bytes really read of the file, from the kernel, for a volume in 64 slabs.

    Starting again for each would read the file 32 times over. indexed_gzip resumes at its last
    seek point, up to 4 MB back: about 3 times over, whatever the size.
    """
    if not Path("/proc/self/io").exists():
        pytest.skip("the kernel does not count what a process reads here")
    stored = noise((256, 256, 512), "uint8")
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(stored, np.eye(4)), path)
    with open_source(str(path)) as source:
        start = _bytes_read()
        for z in range(0, 512, 8):
            slab = source.read(Box((z, 0, 0), (z + 8, 256, 256))).values[0]
            assert (stored[:, :, z : z + 8] == slab.T).all()
        forward = _bytes_read() - start
        source.read(Box((500, 3, 3), (501, 9, 9)))
        back = _bytes_read() - start - forward
    size = path.stat().st_size
    assert size > 30e6
    assert forward < 4 * size
    assert back < 0.5 * size, "reading back resumes at a seek point, not at the start"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", r"the file is empty \(0 bytes\)"),
        (b"junk" * 999, "cannot be opened: "),
    ],
    ids=["missing", "empty", "junk"],
)
def test_a_file_that_is_no_volume_fails_in_one_line(
    content: bytes | None, message: str, name: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SceneError, match=f"{name}: {message}") as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_plain_file_that_is_too_short_is_refused_when_opened(tmp_path: Path, noise: Noise) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(noise((9, 9, 9), "int16"), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(SceneError, match=r"a\.nii: truncated: 1500 bytes, .* needs 1810"):
        open_source(str(path))


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_a_truncated_gzip_fails_where_it_ends(kept: float, tmp_path: Path, noise: Noise) -> None:
    stored = noise((64, 64, 64), "int16")
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(stored, np.eye(4)), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with open_source(str(path)) as source:
        start = source.read(Box((0, 0, 0), (5, 64, 64))).values[0]
        np.testing.assert_array_equal(start.T, stored[:, :, :5])
        with pytest.raises(SceneError, match=r"a\.nii\.gz: truncated: the file ends") as caught:
            source.read(source.geometry.box)
        assert "\n" not in str(caught.value)


def test_a_plain_file_called_gz_is_refused(tmp_path: Path, noise: Noise) -> None:
    nib.save(nib.Nifti1Image(noise((9, 9, 9), "int16"), np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "a.nii").rename(tmp_path / "a.nii.gz")
    with pytest.raises(SceneError, match=r"a\.nii\.gz: cannot be opened: .*not a gzip file"):
        open_source(str(tmp_path / "a.nii.gz"))


def test_damage_inside_a_gzip_is_a_scene_error(tmp_path: Path, noise: Noise) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(noise((64, 64, 64), "int16"), np.eye(4)), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(SceneError, match=r"a\.nii\.gz: "), open_source(str(path)) as source:
        source.read(source.geometry.box)


def test_a_pair_without_its_data_is_refused(tmp_path: Path, noise: Noise) -> None:
    nib.save(nib.Nifti1Pair(noise((4, 5, 6), "int16"), np.eye(4)), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    with pytest.raises(SceneError, match=r"a\.img"):
        open_source(str(tmp_path / "a.hdr"))


def test_one_name_for_the_one_channel(nibabel_file: Find) -> None:
    path = str(nibabel_file("anatomical.nii"))
    assert open_source(path, band_names=["T1w"]).bands == ("T1w",)
    with pytest.raises(RequestError, match=r"2 band names given .* the scene has 1 band"):
        open_source(path, band_names=["T1w", "T2w"])


def _raw_nifti(path: Path, stored: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> Path:
    """A NIfTI-1 file with this slope, which nibabel's own writer would choose itself."""
    header = nib.Nifti1Header()
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header.set_sform(np.eye(4), code=1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["magic"], header["vox_offset"] = b"n+1", 352
    data = header.binaryblock + bytes(4) + stored.tobytes(order="F")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _bytes_read() -> int:
    line = Path("/proc/self/io").read_text().splitlines()[0]
    assert line.startswith("rchar")
    return int(line.split()[1])

"""A DICOM series becomes a volume by its positions: never by file names, thickness or guesses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nibabel.nicom.dicomwrappers import wrapper_from_data
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_rescale
from pydicom.uid import JPEG2000Lossless

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.sources import Scaling, Source, open_in_process, open_source
from segpipe.sources.dicom import reader as dicom_module

Find = Callable[[str], Path]
Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]


def _geometry(source: Source) -> VolumeGeometry:
    assert isinstance(source.geometry, VolumeGeometry)
    return source.geometry


def _whole(source: Source) -> np.ndarray:
    return source.read(source.geometry.box).values[0]


def test_real_ct_has_the_spacing_of_its_positions_and_hounsfield_units(shared: Find) -> None:
    """SliceThickness says 3 mm; positions say 2. Values as pydicom's own rescale gives them."""
    folder = shared("totalsegmentator_ct/dicom")
    by_hand = sorted((dcmread(p) for p in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    expected = np.stack([apply_rescale(d.pixel_array, d) for d in by_hand])
    with open_source(str(folder)) as source:
        assert _geometry(source).spacing == (2.0, 0.9765625, 0.9765625)
        assert _geometry(source).orientation == "LPS"
        assert source.geometry.shape == (20, 512, 512)
        assert (source.dtype, source.scaling) == (np.uint16, (Scaling(1.0, -1024.0),))
        np.testing.assert_array_equal(_whole(source) * 1.0 - 1024.0, expected)
        # The first voxel, from LPS to RAS.
        x, y, z = (float(v) for v in by_hand[0].ImagePositionPatient)
        np.testing.assert_array_equal(_geometry(source).matrix[:3, 3], [-x, -y, z])
        assert len(source.identity["files"]) == 20


def test_pixel_spacing_is_rows_first(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    """PixelSpacing [0.8, 0.5]: rows are 0.8 mm apart (along y), columns 0.5 mm (along x)."""
    volume = noise((4, 6, 9))
    with open_source(str(write_series(tmp_path / "ct", volume))) as source:
        np.testing.assert_array_equal(_whole(source), volume)
        assert _geometry(source).spacing == (2.5, 0.8, 0.5)
        expected = [[-0.5, 0, 0, 10], [0, -0.8, 0, 20], [0, 0, 2.5, 5], [0, 0, 0, 1]]
        np.testing.assert_array_equal(_geometry(source).matrix, expected)
        assert source.scaling == (Scaling(1.0, -1024.0),)


def test_slices_are_sorted_along_their_normal_in_any_orientation(
    tmp_path: Path, slice_file: Write, noise: Noise
) -> None:
    """Sagittal: columns toward posterior, rows toward inferior; the normal points to the left."""
    volume = noise((5, 4, 3))
    for k in (3, 0, 4, 1, 2):
        slice_file(
            tmp_path / "sag" / f"{k % 3}{k}.dcm",
            volume[k],
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
            ImagePositionPatient=[7 - 1.5 * k, 8, 9],
        )
    with open_source(str(tmp_path / "sag")) as source:
        # row x column = (-1, 0, 0): growing slices lie toward the right (-x in LPS).
        np.testing.assert_array_equal(_whole(source), volume)
        assert _geometry(source).orientation == "PIR"
        centre = _geometry(source).matrix @ [2, 3, 4, 1]  # column 2, row 3, slice 4
        lps = np.array([7 - 1.5 * 4, 8 + 2 * 0.5, 9 - 3 * 0.8])
        np.testing.assert_allclose(centre[:3], lps * [-1, -1, 1], rtol=1e-12)


def test_oblique_series_places_every_voxel_where_dicom_says(
    tmp_path: Path, slice_file: Write, noise: Noise
) -> None:
    """The formula of PS3.3 C.7.6.2.1.1, evaluated by hand for some voxels."""
    row = np.array([0.8, 0.6, 0.0])
    column = np.array([-0.36, 0.48, 0.8])
    normal = np.cross(row, column)
    positions = [np.array([1.0, 2.0, 3.0]) + 3.0 * k * normal for k in range(4)]
    for k, position in enumerate(positions):
        slice_file(
            tmp_path / "o" / f"{9 - k}.dcm",
            noise((4, 5)),
            ImageOrientationPatient=[float(v) for v in (*row, *column)],
            ImagePositionPatient=[round(float(v), 10) for v in position],
        )
    geometry = _geometry(open_source(str(tmp_path / "o")))
    for i, j, k in ((0, 0, 0), (4, 0, 0), (0, 3, 0), (4, 3, 3)):
        lps = positions[k] + row * 0.5 * i + column * 0.8 * j
        found = (geometry.matrix @ [i, j, k, 1])[:3]
        np.testing.assert_allclose(found, lps * [-1, -1, 1], atol=1e-8)
    assert geometry.element_sizes()[0] == pytest.approx(0.5 * 0.8 * 3.0)


def test_gantry_tilt_stays_in_the_affine(tmp_path: Path, slice_file: Write, noise: Noise) -> None:
    for k in range(4):
        slice_file(tmp_path / "t" / f"{k}.dcm", noise((3, 3)), ImagePositionPatient=[0, k, 3 * k])
    with open_source(str(tmp_path / "t")) as source:
        np.testing.assert_allclose(_geometry(source).matrix[:3, 2], [0, -1, 3])
        assert any("gantry tilt" in note for note in source.notes)
        assert _geometry(source).element_sizes()[0] == pytest.approx(0.5 * 0.8 * 3), "not |step|"


def test_jpeg_2000_is_decoded_to_the_same_values(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    volume = noise((3, 32, 40), "int16")
    folder = write_series(tmp_path / "j2k", volume, jpeg2000=True)
    assert dcmread(next(folder.iterdir())).file_meta.TransferSyntaxUID == JPEG2000Lossless
    with open_source(str(folder)) as source:
        assert source.dtype == np.int16
        np.testing.assert_array_equal(_whole(source), volume)


def test_rescale_that_differs_between_slices_gives_real_values(
    tmp_path: Path, slice_file: Write, noise: Noise
) -> None:
    """PET: each slice has a slope of its own. Stored values would not be comparable."""
    volume = noise((3, 4, 5))
    for k, slope in enumerate((0.5, 0.25, 3.0)):
        slice_file(
            tmp_path / "pet" / f"{k}.dcm",
            volume[k],
            ImagePositionPatient=[0, 0, 2 * k],
            RescaleSlope=slope,
            RescaleIntercept=k,
        )
    expected = volume * np.array([0.5, 0.25, 3.0])[:, None, None] + np.arange(3)[:, None, None]
    with open_source(str(tmp_path / "pet")) as source:
        assert (source.dtype, source.scaling) == (np.float32, (Scaling(),))
        np.testing.assert_array_equal(_whole(source), expected.astype(np.float32))
        assert any("rescale differs" in note for note in source.notes)


def test_signed_and_unsigned_slices_keep_all_values(tmp_path: Path, slice_file: Write) -> None:
    planes = [np.array([[-5, 32767]], "int16"), np.array([[0, 65535]], "uint16")]
    for k, plane in enumerate(planes):
        slice_file(tmp_path / "m" / f"{k}.dcm", plane, ImagePositionPatient=[0, 0, k])
    with open_source(str(tmp_path / "m")) as source:
        assert source.dtype == np.int32
        assert _whole(source).tolist() == [[[-5, 32767]], [[0, 65535]]]


def test_monochrome1_keeps_its_values_and_says_so(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    volume = noise((2, 4, 4))
    folder = write_series(tmp_path / "x", volume, PhotometricInterpretation="MONOCHROME1")
    with open_source(str(folder)) as source:
        np.testing.assert_array_equal(_whole(source), volume)
        assert any("MONOCHROME1" in note for note in source.notes)


def test_missing_rescale_means_as_stored(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    folder = write_series(tmp_path / "mr", noise((2, 4, 4)), RescaleSlope=None, RescaleIntercept=None)
    assert open_source(str(folder)).scaling == (Scaling(),)


def test_a_gap_is_refused_with_the_number_of_missing_slices(
    tmp_path: Path, write_series: Write, noise: Noise
) -> None:
    folder = write_series(tmp_path / "ct", noise((8, 4, 4)))
    (folder / "IM0004.dcm").unlink()
    (folder / "IM0005.dcm").unlink()
    with pytest.raises(
        SceneError,
        match=r"2 slices are missing between IM0006.dcm and IM0003.dcm \(7.50 mm apart where "
        r"others are 2.50\)",
    ):
        open_source(str(folder))


def test_duplicates_are_refused(tmp_path: Path, write_series: Write, slice_file: Write, noise: Noise) -> None:
    folder = write_series(tmp_path / "ct", noise((4, 4, 4)))
    slice_file(folder / "again.dcm", noise((4, 4)), ImagePositionPatient=[-10, -20, 7.5])
    with pytest.raises(SceneError, match=r"two slices at 7\.50 mm \(IM0003.dcm and again.dcm\)"):
        open_source(str(folder))


def test_two_echoes_at_every_position_are_refused(tmp_path: Path, slice_file: Write, noise: Noise) -> None:
    for n in range(8):
        slice_file(tmp_path / "e" / f"{n}.dcm", noise((4, 4)), ImagePositionPatient=[0, 0, n // 2])
    with pytest.raises(SceneError, match="several echoes or phases"):
        open_source(str(tmp_path / "e"))


@pytest.mark.parametrize(("shift", "accepted"), [(0.02, True), (0.06, False)])
def test_steps_may_differ_by_one_percent(
    shift: float, accepted: bool, tmp_path: Path, slice_file: Write, noise: Noise
) -> None:
    """Of 2.5 mm: 0.025 mm."""
    for k in range(5):
        slice_file(
            tmp_path / "u" / f"{k}.dcm",
            noise((4, 4)),
            ImagePositionPatient=[0, 0, 2.5 * k + (shift if k == 2 else 0)],
        )
    if accepted:
        assert open_source(str(tmp_path / "u")).geometry.spacing == (2.5, 0.8, 0.5)
    else:
        with pytest.raises(SceneError, match=r"uneven slices: .* 2\.560 mm apart, others 2\.5"):
            open_source(str(tmp_path / "u"))


def test_one_slice_alone_is_refused(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    folder = write_series(tmp_path / "one", noise((1, 4, 4)))
    with pytest.raises(SceneError, match="one slice only"):
        open_source(str(folder))
    with pytest.raises(SceneError, match="a single DICOM file; give the folder"):
        open_source(str(next(folder.iterdir())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SeriesInstanceUID": "9.9"}, r"holds 2 series \(CT 3 x 4x4 from .*; CT 1 x 4x4 from z"),
        ({"PixelSpacing": [0.8, 0.8]}, r"z\.dcm: has PixelSpacing \(0.8, 0.8\), not \(0.8, 0.5\)"),
        ({"ImageOrientationPatient": [0, 1, 0, -1, 0, 0]}, "has another orientation"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient has 0 values, expected 3 numbers"),
        ({"PixelSpacing": None}, "PixelSpacing has 0 values, expected 2 numbers"),
        ({"NumberOfFrames": 30}, r"z\.dcm: a multi-frame \(enhanced\) image of 30 frames, not"),
        ({"BitsAllocated": 1}, "1 bits per pixel"),
    ],
    ids=["series", "spacing", "orientation", "position", "no spacing", "enhanced", "bits"],
)
def test_what_does_not_belong_is_refused_by_file_and_never_by_patient(
    change: dict[str, object],
    message: str,
    tmp_path: Path,
    write_series: Write,
    slice_file: Write,
    noise: Noise,
) -> None:
    folder = write_series(tmp_path / "ct", noise((3, 4, 4)))
    tags = {"ImagePositionPatient": [-10, -20, 12.5], **change}
    slice_file(folder / "z.dcm", noise((4, 4)), **tags)
    with pytest.raises(SceneError, match=message) as caught:
        open_source(str(folder))
    assert "secret" not in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_localizers_and_other_files_are_left_out_with_a_note(
    tmp_path: Path, write_series: Write, slice_file: Write, noise: Noise
) -> None:
    volume = noise((3, 4, 4))
    folder = write_series(tmp_path / "ct", volume)
    slice_file(folder / "scout.dcm", noise((9, 9)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    slice_file(folder / "seg.dcm", noise((4, 4)), Modality="SEG")
    (folder / "readme.txt").write_text("not an image")
    with open_source(str(folder)) as source:
        np.testing.assert_array_equal(_whole(source), volume)
        (note,) = source.notes
    assert note == "left out files that are no image slices (1 SEG, 1 localizer, 1 not DICOM)"


def test_nothing_we_keep_names_the_patient(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    source = open_source(str(write_series(tmp_path / "ct", noise((3, 4, 4)))))
    kept = json.dumps([source.identity, source.notes, source.geometry.to_dict(), source.uri])
    assert "secret" not in kept.lower()


@pytest.mark.parametrize("content", [b"", b"junk" * 100], ids=["empty", "junk"])
def test_a_damaged_slice_is_no_slice_left_out(
    content: bytes, tmp_path: Path, write_series: Write, noise: Noise
) -> None:
    """At the end of the series no gap would show that it is missing."""
    folder = write_series(tmp_path / "ct", noise((3, 4, 4)))
    (folder / "IM0001.dcm").write_bytes(content)
    with pytest.raises(SceneError, match=r"IM0001\.dcm: cannot be read as DICOM") as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


def test_truncated_pixels_fail_when_read_naming_the_file(
    tmp_path: Path, write_series: Write, noise: Noise
) -> None:
    volume = noise((3, 64, 64))
    folder = write_series(tmp_path / "ct", volume)
    path = folder / "IM0001.dcm"  # the last in space
    path.write_bytes(path.read_bytes()[:-4000])
    with open_source(str(folder)) as source:
        first = source.read(Box((0, 0, 0), (2, 64, 64))).values[0]
        np.testing.assert_array_equal(first, volume[:2])
        with pytest.raises(SceneError, match=r"IM0001\.dcm: cannot be decoded: ") as caught:
            source.read(Box((2, 0, 0), (3, 1, 1)))
        assert "\n" not in str(caught.value)


def test_a_compression_without_decoder_is_known_when_opened(
    tmp_path: Path, write_series: Write, noise: Noise
) -> None:
    lossless_jpeg = "1.2.840.10008.1.2.4.57"
    folder = write_series(tmp_path / "ct", noise((2, 4, 4)))
    for path in folder.iterdir():
        ds = dcmread(path)
        ds.file_meta.TransferSyntaxUID = lossless_jpeg
        ds.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        ds["PixelData"].VR = "OB"
        ds.save_as(path)
    with pytest.raises(SceneError, match=r"compressed as JPEG Lossless.*no decoder is installed"):
        open_source(str(folder))


def test_reading_decodes_only_the_slices_asked_for_and_keeps_a_bounded_number(
    tmp_path: Path, write_series: Write, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files of other slices gone, the ones asked for are still read; and again."""
    volume = noise((6, 16, 16))
    folder = write_series(tmp_path / "ct", volume)
    monkeypatch.setattr(dicom_module, "CACHE_BYTES", 2 * 16 * 16 * 2)  # two slices
    with open_in_process(str(folder)) as source:
        for n in (1, 2, 3, 4):  # slices 5, 4, 3, 2 in space
            (folder / f"IM{n:04d}.dcm").unlink()
        box = Box((0, 3, 4), (2, 9, 16))
        np.testing.assert_array_equal(source.read(box).values[0], volume[box.slices])
        for n in (5, 6):
            (folder / f"IM{n:04d}.dcm").unlink()
        np.testing.assert_array_equal(source.read(box).values[0], volume[box.slices])
        source.close()
        with pytest.raises(SceneError, match="cannot be decoded"):
            source.read(box)


def test_orientation_agrees_with_nibabel(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    """nibabel's own DICOM reader (nicom) places the first slice's pixels at the same points."""
    folder = write_series(tmp_path / "ct", noise((3, 6, 9)))
    first = wrapper_from_data(dcmread(folder / "IM0003.dcm"))
    ours = _geometry(open_source(str(folder))).matrix
    # nicom works in LPS, on (row, column, slice); of one slice it cannot know the step.
    theirs = np.diag([-1, -1, 1, 1]) @ first.affine @ np.eye(4)[[1, 0, 2, 3]]
    np.testing.assert_allclose(ours[:, [0, 1, 3]], theirs[:, [0, 1, 3]])


def test_a_real_ct_slice_stacked_with_non_square_pixels(tmp_path: Path) -> None:
    """pydicom's packaged CT slice, three times, moved along z and with other pixel spacing."""
    path = get_testdata_file("CT_small.dcm", download=False)
    if not path:
        pytest.skip("pydicom is installed without its test files")
    for k in range(3):
        ds = dcmread(str(path))
        ds.PixelSpacing = [0.9, 0.4]
        ds.ImagePositionPatient = [-158.0, -179.0, -75.0 - 5 * k]
        ds.save_as(tmp_path / f"{k}.dcm")
    expected = apply_rescale(dcmread(str(path)).pixel_array, dcmread(str(path)))
    with open_source(str(tmp_path)) as source:
        scaling = source.scaling[0]
        assert _geometry(source).spacing == (5.0, 0.9, 0.4)
        for plane in _whole(source) * scaling.scale + scaling.offset:
            np.testing.assert_array_equal(plane, expected)
        assert _geometry(source).matrix[2, 3] == -85.0, "the lowest slice comes first"


def test_empty_and_missing_folders_fail_alone(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="no such file"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(SceneError, match="no DICOM image slices"):
        open_source(str(tmp_path))


def test_one_name_for_the_one_channel(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    folder = str(write_series(tmp_path / "ct", noise((2, 4, 4))))
    assert open_source(folder, band_names=["CT"]).bands == ("CT",)
    with pytest.raises(RequestError, match="2 band names given"):
        open_source(folder, band_names=["a", "b"])

"""Previews: pixels at known places, orientation, thinning, bounded reads."""

from __future__ import annotations

import io
from itertools import combinations, permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
from PIL import Image
from pyproj import CRS

from segpipe.boxes import Box
from segpipe.errors import RequestError
from segpipe.geometry import RasterGeometry, volume_geometry
from segpipe.models.card import Class
from segpipe.report.colors import rgb
from segpipe.report.drawing import DIFFERENCE
from segpipe.report.pictures import THUMBNAIL_BYTES, dump_previews, load_previews
from segpipe.report.planes import VolumePictures, structure_centre, volume_pictures
from segpipe.report.preview import (
    RasterPictures,
    raster_pictures,
    raster_preview,
    rgb_channels,
    volume_preview,
)
from segpipe.report.sampling import (
    READ_EDGE,
    Plane,
    Readers,
    Stack,
    sample_image,
    sample_labels,
    thinned,
)
from segpipe.sources.base import Pixels

SHARED = Path(__file__).parents[3] / "shared" / "data"
UTM = CRS.from_epsg(32616).to_wkt()
FOREST, WATER = Class(value=1, name="forest", color="#1b7837"), Class(value=2, name="water", color="#2b83ba")
GROUND = Class(value=0, name="background", color="#000000", background=True)
ORGAN, BONE = (
    Class(value=5, name="organ", color="#ff0000"),
    Class(value=9, name="bone", color="#00ff00"),
)


def panel(drawn: RasterPictures | VolumePictures, key: str) -> np.ndarray:
    """RGBA as drawn, before it is encoded."""
    return drawn.pictures[key].astype(int)


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(int)


def reader(image: np.ndarray, valid: np.ndarray | None = None):
    """An image reader over an array (c, …)."""
    seen = np.ones(image.shape[1:], bool) if valid is None else valid

    def read(box: Box, channels: tuple[int, ...] | None = None) -> Pixels:
        values = image[(slice(None), *box.slices)]
        return Pixels(values if channels is None else values[list(channels)], seen[box.slices])

    return read


def raster_input(labels: np.ndarray, reference: np.ndarray | None = None, **more) -> dict[str, object]:
    """Readers and geometry of a raster, by the names of `raster_preview`'s arguments."""
    shape = labels.shape
    image = more.pop("image", np.linspace(0, 100, labels.size).reshape(1, *shape).astype(np.float32))
    transform = more.pop("transform", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    return {
        "read_image": reader(image, more.pop("valid", None)),
        "read_labels": lambda box: labels[box.slices],
        "read_reference": None if reference is None else lambda box: reference[box.slices],
        "geometry": RasterGeometry(shape, transform, more.pop("crs", UTM)),
        "bands": more.pop("bands", ()),
        "classes": more.pop("classes", (FOREST, WATER)),
        "nodata": 255,
        **more,
    }


def raster(labels: np.ndarray, reference: np.ndarray | None = None, **more) -> RasterPictures:
    given = raster_input(labels, reference, **more)
    read = Readers(*(given.pop(f"read_{what}") for what in ("image", "labels", "reference")))
    return raster_pictures(read, **given, max_size=900, count=None)


def test_real_landsat_pixels() -> None:
    folder = SHARED / "nc_landsat"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    with rasterio.open(folder / "landsat_multiband.tif") as file:
        image, nodata = file.read(), file.nodata
        place = RasterGeometry(file.shape, tuple(file.transform)[:6], file.crs.to_wkt(version="WKT2_2019"))
    with rasterio.open(folder / "strata.tif") as file:
        reference = np.where(file.read(1) < 0, 255, file.read(1)).astype(np.uint8)
    valid = (image != nodata).all(axis=0)
    labels = np.where(valid, np.roll(reference, 5, axis=1), 255).astype(np.uint8)
    colors = ("#d7191c", "#f4d35e", "#b8de8f", "#8c6d31", "#1b7837", "#2b83ba", "#c2a5cf")
    classes = [Class(value=i + 1, name=f"class {i + 1}", color=c) for i, c in enumerate(colors)]
    read = Readers(reader(image, valid), lambda b: labels[b.slices], lambda b: reference[b.slices])
    result = raster_pictures(read, place, ("blue", "green", "red", "nir", "swir16"), classes, 255, 900, None)
    red, green, blue = image[2], image[1], image[0]
    shown = panel(result, "image")
    assert shown.shape == (443, 489, 4)
    assert shown[0, 0, 3] == 0  # nodata is transparent
    y, x = 200, 250
    for index, band in enumerate((red, green, blue)):
        low, high = np.percentile(band[valid], (2, 98))
        assert abs(shown[y, x, index] - np.clip((band[y, x] - low) / (high - low), 0, 1) * 255) <= 1
    over = panel(result, "labels")[y, x, :3]
    color = np.array(rgb(colors[labels[y, x] - 1]))
    assert np.abs(over - (0.35 * shown[y, x, :3] + 0.65 * color)).max() <= 1
    difference = panel(result, "difference")
    agree = valid & (labels == reference)
    agree[380:] = False
    assert np.unique(difference[agree], axis=0).tolist() == [[*rgb(DIFFERENCE["agree"][1]), 255]]
    differs = valid & (labels != reference) & (labels != 255) & (reference != 255)
    differs[380:] = False  # the scale bar lies on the last rows
    assert np.unique(difference[differs], axis=0).tolist() == [[*rgb(DIFFERENCE["wrong"][1]), 255]]
    assert (difference[:380][~valid[:380]][:, 3] == 0).all()


def test_difference_has_every_kind() -> None:
    """Prediction over reference: agree, missed, hallucinated, wrong, both background, ignored."""
    labels = np.array([[5, 0, 5, 5, 0, 5]], np.uint8)
    reference = np.array([[5, 5, 0, 9, 0, 77]], np.uint8)
    result = raster(labels, reference, classes=(GROUND, ORGAN, BONE))
    row = panel(result, "difference")[0]
    kinds = [rgb(DIFFERENCE[k][1]) for k in ("agree", "missed", "hallucinated", "wrong")]
    assert [tuple(p[:3]) for p in row[:4]] == kinds
    assert row[4].tolist() == [232, 234, 237, 255]
    assert row[5, 3] == 0
    whole = raster_preview(**raster_input(labels, reference, classes=(GROUND, ORGAN, BONE)))
    assert [e.name.split()[0] for e in whole.difference_legend] == [
        "agree",
        "missed",
        "hallucinated",
        "wrong",
    ]


def test_background_and_nodata_are_not_painted() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[3:6, 3:6] = 5
    labels[0, 0] = 255
    result = raster(labels, classes=(GROUND, ORGAN))
    image, over = panel(result, "image"), panel(result, "labels")
    assert np.array_equal(image[labels != 5], over[labels != 5])
    assert over[3, 3].tolist() == [255, 0, 0, 255]  # the outline is opaque
    expected = 0.6 * image[4, 4, :3] + 0.4 * np.array([255, 0, 0])
    assert np.abs(over[4, 4, :3] - expected).max() <= 1
    assert [e.name for e in raster_preview(**raster_input(labels, classes=(GROUND, ORGAN))).legend] == [
        "organ"
    ]


def test_a_label_of_no_class_is_grey_not_hidden() -> None:
    result = raster(np.full((4, 4), 44, np.uint8), image=np.zeros((1, 4, 4), np.float32))
    assert panel(result, "labels")[2, 2, :3].tolist() == [83, 83, 83]  # 0.65 × 128


def test_large_raster_is_thinned_from_bounded_reads() -> None:
    rng = np.random.default_rng(0)
    shape = (2500, 4100)
    labels = rng.integers(1, 3, shape, dtype=np.uint8)
    image = rng.random((1, *shape), dtype=np.float32)
    valid = rng.random(shape) < 0.7
    plane = thinned(shape, (0, 1), 0, 900)
    assert (plane.factors, plane.size) == ((5, 5), (500, 820))
    reads: list[Box] = []

    def read(box: Box) -> np.ndarray:
        reads.append(box)
        return labels[box.slices]

    assert np.array_equal(sample_labels(read, plane), labels[2::5, 2::5])
    assert sum(b.size for b in reads) == labels.size
    assert max(max(b.shape) for b in reads) <= READ_EDGE
    values, seen = sample_image(reader(image, valid), plane, (0,))
    cells = image[0].reshape(500, 5, 820, 5).transpose(0, 2, 1, 3).reshape(500, 820, 25)
    inside = valid.reshape(500, 5, 820, 5).transpose(0, 2, 1, 3).reshape(500, 820, 25)
    assert np.array_equal(seen, inside.any(axis=2))
    expected = (cells * inside).sum(axis=2, dtype=np.float64) / np.maximum(inside.sum(axis=2), 1)
    assert np.allclose(values[0], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (10, 11), (13, 5)])
@pytest.mark.parametrize("factor", [1, 2, 3, 5, 16])
def test_short_last_cells(shape: tuple[int, int], factor: int) -> None:
    labels = np.arange(shape[0] * shape[1]).reshape(shape)
    plane = Plane(shape, (0, 1), (factor, factor))
    rows = np.minimum(np.arange(plane.size[0]) * factor + factor // 2, shape[0] - 1)
    columns = np.minimum(np.arange(plane.size[1]) * factor + factor // 2, shape[1] - 1)
    assert np.array_equal(sample_labels(lambda b: labels[b.slices], plane), labels[np.ix_(rows, columns)])
    values, seen = sample_image(reader(labels[None].astype(np.float32)), plane, (0,))
    assert values.shape[1:] == seen.shape == plane.size and seen.all()
    assert np.isclose(values[0, 0, 0], labels[:factor, :factor].mean())


def test_south_up_is_shown_north_up() -> None:
    labels = np.array([[1, 1], [2, 2]], np.uint8)
    up = panel(raster(labels), "labels")
    down = panel(
        raster(labels[::-1], transform=(10.0, 0.0, 0.0, 0.0, 10.0, 0.0), image=np.zeros((1, 2, 2))), "labels"
    )
    assert up[0, 0, 1] > up[0, 0, 2]  # forest is green, and on top
    assert down[0, 0].tolist() == down[0, 1].tolist()
    assert down[0, 0, 1] > down[0, 0, 2]


def test_degrees_are_not_square_on_the_ground() -> None:
    """At 60° north a degree of longitude is half as long: the picture is half as wide."""
    labels = np.ones((100, 100), np.uint8)
    result = raster(labels, transform=(0.01, 0, 10, 0, -0.01, 60.5), crs=CRS.from_epsg(4326).to_wkt())
    assert panel(result, "labels").shape[:2] == (100, 50)


@pytest.mark.parametrize(
    ("bands", "count", "channels", "words"),
    [
        (("blue", "green", "Red", "nir"), None, (2, 1, 0), "Bands Red, green, blue"),
        (("B02", "B03", "B04", "B08"), None, (2, 1, 0), "Bands B04, B03, B02"),
        (("nir", "swir", "red"), None, (0, 1, 2), "False colours: bands nir, swir, red"),
        (("pan",), None, (0,), "Band pan"),
        ((), 1, (0,), "Band 1"),
        ((), 6, (0, 1, 2), "False colours: bands 1, 2, 3"),
        (("a", "b"), None, (0,), "Band a"),
    ],
)
def test_bands_shown(bands, count, channels, words) -> None:
    assert rgb_channels(bands, count) == (channels, words)


def anatomy() -> tuple[np.ndarray, np.ndarray]:
    """A volume on (x right, y anterior, z superior), all different along every axis, and labels."""
    x, y, z = np.meshgrid(np.arange(12), np.arange(16), np.arange(20), indexing="ij")
    image = (3 * x + 5 * y + 7 * z).astype(np.int16)
    labels = np.zeros(image.shape, np.uint8)
    labels[7:12, 9:14, 11:18] = 5  # odd extents: one median voxel, however an axis runs
    labels[1:3, 2:4, 3:5] = 9
    return image, labels


def oriented(axes: tuple[int, ...], signs: tuple[int, ...]):
    """The same anatomy stored in another voxel order: arrays (z, y, x) and the affine."""
    image, labels = anatomy()
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    nifti = [nib.Nifti1Image(a, affine) for a in (image, labels)]
    turn = np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)])
    turned = [n.as_reoriented(turn) for n in nifti]
    arrays = [np.asarray(t.dataobj).T for t in turned]
    return arrays[0], arrays[1], volume_geometry(arrays[0].shape, turned[0].affine)


def volume_input(image: np.ndarray, labels: np.ndarray, place) -> tuple:
    return reader(image[None]), lambda b: labels[b.slices], None, place, (GROUND, ORGAN, BONE), None


def volume(image: np.ndarray, labels: np.ndarray, place) -> VolumePictures:
    read_image, read_labels, _, *rest = volume_input(image, labels, place)
    return volume_pictures(Readers(read_image, read_labels), *rest, 600, 0)


def test_every_voxel_order_gives_the_same_upright_pictures() -> None:
    expected = volume_preview(*volume_input(*oriented((0, 1, 2), (1, 1, 1))), 300)
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            image, labels, place = oriented(axes, signs)
            found = volume_preview(*volume_input(image, labels, place), 300)
            for a, b in zip(expected.panels, found.panels, strict=True):
                assert a.content == b.content, (place.orientation, a.key)
            assert found.slices == expected.slices, place.orientation
            assert found.thumbnail == expected.thumbnail


def test_slices_go_from_the_feet_up_at_the_heights_of_the_affine() -> None:
    """Each slice is the anatomy's own, where nibabel puts its middle voxel."""
    _, labels = anatomy()  # (x, y, z), z superior, 20 slices of 3 mm
    stack = volume_preview(*volume_input(*oriented((2, 0, 1), (-1, 1, -1)))).slices
    assert stack is not None and len(stack.slices) == 20
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    for z, item in enumerate(stack.slices):
        height = nib.affines.apply_affine(affine, (5.5, 7.5, z))[2]
        assert item.caption == f"Slice {z + 1} of 20, S {height:.1f} mm"
        shown = decoded(item.jpeg)
        assert shown.shape[:2] == (stack.height, stack.width) == (256, 154)  # 40 mm by 24 mm
        reds = (shown[..., 0] > 1.4 * shown[..., 1] + 30).mean()
        assert (reds > 0.05) == (labels[:, :, z] == 5).any(), z
    at = [3 * z for z in range(20)]
    assert at[stack.first] == 3 * 14  # the median of the organ, z 11 to 17
    middle = decoded(stack.slices[stack.first].jpeg)
    red = middle[..., 0] > 1.4 * middle[..., 1] + 30
    assert np.flatnonzero(red.any(axis=0)).max() < 0.5 * stack.width  # the patient's right
    assert np.flatnonzero(red.any(axis=1)).max() < 0.5 * stack.height  # and front


@pytest.mark.parametrize("across", [0, 1, 2])
@pytest.mark.parametrize("factor", [1, 3])
def test_a_stack_is_read_once_in_bounded_slabs(
    across: int, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segpipe.report.sampling.SLAB_ELEMENTS", 2000)
    rng = np.random.default_rng(1)
    shape = (17, 20, 23)
    labels = rng.integers(0, 9, shape, dtype=np.uint8)
    image, valid = rng.random((2, *shape), dtype=np.float32), rng.random(shape) < 0.8
    at = (0, 1, 7, 12, 16)
    stack = Stack(shape, across, at, factor)
    reads: list[Box] = []

    def read(box: Box) -> np.ndarray:
        reads.append(box)
        return labels[box.slices]

    found = sample_labels(read, stack)
    values, seen = sample_image(reader(image, valid), stack, (1,))
    kept = [axis for axis in range(3) if axis != across]
    for number, index in enumerate(at):
        plane = Plane(shape, (kept[0], kept[1]), (factor, factor), index)
        assert np.array_equal(found[number], sample_labels(lambda b: labels[b.slices], plane))
        alone, alone_seen = sample_image(reader(image, valid), plane, (1,))
        assert np.array_equal(values[:, number], alone) and np.array_equal(seen[number], alone_seen)
    assert max(b.size for b in reads) <= max(2000, factor * 20 * 23)
    assert sum(b.size for b in reads) <= labels.size
    slabs = [set(range(b.start[0], b.stop[0])) for b in reads]
    assert sum(map(len, slabs)) == len(set().union(*slabs))  # no slice of the file twice


def test_a_stack_of_slices_stays_small() -> None:
    """Noise compresses worst: quality gives way, and in the end the number of slices."""
    rng = np.random.default_rng(2)
    image = rng.integers(0, 4000, (90, 256, 256), dtype=np.int16)
    labels = np.zeros(image.shape, np.uint8)
    labels[40:50, 100:150, 100:150] = 5
    place = volume_geometry(image.shape, np.eye(4))
    stack = volume_preview(*volume_input(image, labels, place)).slices
    assert stack is not None
    assert sum(len(s.jpeg) for s in stack.slices) <= 600_000
    assert 12 <= len(stack.slices) <= 48
    ranks = [int(s.caption.split()[1]) for s in stack.slices]
    steps = np.diff(ranks)
    assert set(steps) <= {steps.min(), steps.min() + 1}
    assert abs(ranks[stack.first] - 45) <= steps.max()


def test_uncertainty_is_drawn_in_cividis() -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    labels = np.ones((1, 101), np.uint8)
    labels[0, 50] = 255
    shares = np.linspace(0, 1, 101)[None]
    given = raster_input(labels)
    read = Readers(
        *(given.pop(f"read_{w}") for w in ("image", "labels", "reference")), lambda b: shares[b.slices]
    )
    drawn = panel(raster_pictures(read, **given, max_size=900, count=None), "uncertainty")
    expected = np.round(np.array(colormaps["cividis"](shares[0])) * 255)
    kept = labels[0] != 255
    assert np.abs(drawn[0, kept, :3] - expected[kept, :3]).max() <= 8  # of 255, between the stops
    assert drawn[0, :, 3].tolist() == np.where(kept, 255, 0).tolist()
    whole = raster_preview(**raster_input(labels), read_uncertainty=lambda b: shares[b.slices])
    assert [p.key for p in whole.panels] == ["image", "labels", "uncertainty"]


def test_radiological_convention() -> None:
    """The organ is at the right, front and top of the patient: left and top of the pictures."""
    result = volume(*oriented((0, 1, 2), (1, 1, 1)))
    over = panel(result, "labels")
    red = (over[..., 0] > 200) & (over[..., 1] < 90) & (over[..., 2] < 90)
    width = int((600 - 16) * 24 / (24 + 24 + 40))  # millimetres of x, x and y
    axial = np.flatnonzero(red[:, :width].any(axis=0))
    assert axial.max() < width * 0.5  # the patient's right, drawn left
    rows = np.flatnonzero(red[:, :width].any(axis=1))
    assert rows.min() < over.shape[0] / 2
    assert "patient's right is on the left" in result.notes[0]


def test_planes_have_square_millimetres() -> None:
    image, labels = np.zeros((4, 40, 40), np.int16), np.zeros((4, 40, 40), np.uint8)
    labels[1, 10:20, 10:20] = 5
    place = volume_geometry(labels.shape, np.diag([1.0, 1.0, 10.0, 1.0]))
    result = volume(image, labels, place)
    over = panel(result, "labels")
    assert 598 <= over.shape[1] <= 600
    assert abs((over.shape[0] - 26) - (600 - 16) / 3) <= 1  # 40 mm high, as wide as each of three


def test_centre_is_the_median_of_the_largest_structure() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[1:4, 2:7, 3:8] = 5
    labels[8, 8, 8] = 9
    classes = (GROUND, BONE, ORGAN)
    assert structure_centre(lambda b: labels[b.slices], labels.shape, classes, None) == ((2, 4, 5), "organ")
    empty = np.zeros_like(labels)
    assert structure_centre(lambda b: empty[b.slices], labels.shape, classes, None) == ((5, 5, 5), None)


def test_real_ct() -> None:
    folder = SHARED / "totalsegmentator_ct"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    image = nib.load(folder / "example_ct_sm.nii.gz")
    values = np.asarray(image.dataobj).T
    labels = np.asarray(nib.load(folder / "example_seg.nii.gz").dataobj).T
    classes = [GROUND, Class(value=5, name="liver", color="#ff0000")]
    place = volume_geometry(values.shape, image.affine)
    liver = np.where(labels == 5, 5, 0).astype(np.uint8)
    read = Readers(reader(values[None]), lambda b: liver[b.slices], lambda b: liver[b.slices])
    result = volume_pictures(read, place, classes, None, 1200, 0)
    assert list(result.pictures) == ["image", "labels", "reference", "difference"]
    over = panel(result, "labels")
    red = over[..., 0] - np.maximum(over[..., 1], over[..., 2]) > 60
    axial = np.flatnonzero(red[:, :400].any(axis=0))
    assert axial.mean() < 210  # the liver is on the patient's right: left of the picture
    assert not (panel(result, "difference")[:, :, :3] == rgb(DIFFERENCE["missed"][1])).all(axis=2).any()


def test_same_input_same_bytes_and_archive() -> None:
    labels = np.random.default_rng(4).integers(1, 3, (60, 70), dtype=np.uint8)
    first, second = (raster_preview(**raster_input(labels, labels)) for _ in range(2))
    assert first == second
    assert dump_previews(first) == dump_previews(second)
    assert load_previews(dump_previews(first)) == first
    deep = volume_preview(*volume_input(*oriented((0, 1, 2), (1, 1, 1))))
    assert load_previews(dump_previews(deep)) == deep
    with pytest.raises(RequestError, match="run the job again"):
        load_previews(b"not a zip")


def test_panels_are_what_was_drawn() -> None:
    """Flat maps to the bit; photographs nearly, and their transparency to the bit."""
    labels = np.repeat(np.repeat(np.array([[1, 2], [2, 255]], np.uint8), 40, 0), 40, 1)
    truth = np.roll(labels, 10, 0)
    drawn = raster(labels, truth, valid=labels != 255)
    for shown in raster_preview(**raster_input(labels, truth, valid=labels != 255)).panels:
        found, expected = decoded(shown.content), panel(drawn, shown.key)
        assert (shown.height, shown.width) == expected.shape[:2]
        assert np.array_equal(found[..., 3], expected[..., 3])
        seen = expected[..., 3] > 0
        error = np.abs(found - expected)[seen]
        assert error.max() == 0 if shown.key == "difference" else error.mean() < 5


def test_composite_and_thumbnail() -> None:
    result = raster_preview(**raster_input(np.ones((300, 400), np.uint8), np.ones((300, 400), np.uint8)))
    composite = Image.open(io.BytesIO(result.composite))
    assert composite.width > 4 * 400 and composite.mode == "RGB"
    assert composite.getpixel((1, 1)) == (255, 255, 255)
    assert max(Image.open(io.BytesIO(result.thumbnail)).size) == 192


def test_a_thumbnail_of_noise_is_small_too() -> None:
    rng = np.random.default_rng(6)
    noise = rng.random((3, 400, 400), dtype=np.float32)
    result = raster_preview(**raster_input(rng.integers(1, 3, (400, 400), dtype=np.uint8), image=noise))
    assert len(result.thumbnail) <= THUMBNAIL_BYTES == 20_000


def lab(color: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(color, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deutan": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.mark.parametrize("vision", VISION)
def test_difference_colours_are_told_apart(vision: str) -> None:
    """At least 20 in CIE76 between any two, with every kind of colour vision (2.3 is noticeable)."""
    seen = {}
    for kind, (_, color) in DIFFERENCE.items():
        share = np.array(rgb(color)) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        seen[kind] = lab(np.asarray(VISION[vision]) @ linear)
    distances = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(seen, 2)}
    assert min(distances.values()) > 20, distances

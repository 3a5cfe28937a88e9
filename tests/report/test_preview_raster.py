"""Pictures of rasters: what is painted, thinning, encoding."""

from __future__ import annotations

import io

import numpy as np
import pytest
import rasterio
from PIL import Image
from PIL.ImageColor import getrgb
from pyproj import CRS

from segpipe.config.card import Class
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.pictures.archive import THUMBNAIL_BYTES
from segpipe.pictures.drawing import DIFFERENCE
from segpipe.pictures.preview import raster_pictures, raster_preview, rgb_channels
from segpipe.pictures.sampling import READ_EDGE, Plane, Readers, sample_image, sample_labels, thinned
from tests.report.drawings import BONE, GROUND, ORGAN, SHARED, decoded, panel, raster, raster_input, reader


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
    color = np.array(getrgb(colors[labels[y, x] - 1]))
    assert np.abs(over - (0.35 * shown[y, x, :3] + 0.65 * color)).max() <= 1
    difference = panel(result, "difference")
    agree = valid & (labels == reference)
    agree[380:] = False
    assert np.unique(difference[agree], axis=0).tolist() == [[*getrgb(DIFFERENCE["agree"][1]), 255]]
    differs = valid & (labels != reference) & (labels != 255) & (reference != 255)
    differs[380:] = False  # the scale bar lies on the last rows
    assert np.unique(difference[differs], axis=0).tolist() == [[*getrgb(DIFFERENCE["wrong"][1]), 255]]
    assert (difference[:380][~valid[:380]][:, 3] == 0).all()


def test_difference_has_every_kind() -> None:
    """Prediction over reference: agree, missed, hallucinated, wrong, both background, ignored."""
    labels = np.array([[5, 0, 5, 5, 0, 5]], np.uint8)
    reference = np.array([[5, 5, 0, 9, 0, 77]], np.uint8)
    result = raster(labels, reference, classes=(GROUND, ORGAN, BONE))
    row = panel(result, "difference")[0]
    kinds = [getrgb(DIFFERENCE[k][1]) for k in ("agree", "missed", "hallucinated", "wrong")]
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


def test_uncertainty_is_drawn_in_cividis() -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    labels = np.ones((1, 101), np.uint8)
    labels[0, 50] = 255
    shares = np.linspace(0, 1, 101)[None]
    drawn = panel(raster(labels, uncertainty=lambda b: shares[b.slices]), "uncertainty")
    expected = np.round(np.array(colormaps["cividis"](shares[0])) * 255)
    kept = labels[0] != 255
    assert np.abs(drawn[0, kept, :3] - expected[kept, :3]).max() <= 8  # of 255, between the stops
    assert drawn[0, :, 3].tolist() == np.where(kept, 255, 0).tolist()
    whole = raster_preview(**raster_input(labels, uncertainty=lambda b: shares[b.slices]))
    assert [p.key for p in whole.panels] == ["image", "labels", "uncertainty"]


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

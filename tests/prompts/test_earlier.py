"""Labels as prompts: components and points against scipy, maps against rasterio."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer
from rasterio.features import shapes
from scipy import ndimage

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.prompts.inputs import components
from segpipe.prompts.inputs.components import (
    component_strips,
    deepest,
    find_components,
    label_prompts,
    read_labels,
)

UTM = "EPSG:32617"
DATA = Path(__file__).parents[3] / "shared" / "data"


def scipy_components(labels: np.ndarray) -> list[np.ndarray]:
    """Masks of the components of every label, 8 or 26 neighbours, by their first element."""
    structure = np.ones((3,) * labels.ndim)
    masks = []
    for value in np.unique(labels[labels > 0]):
        numbered, count = ndimage.label(labels == value, structure)
        masks += [numbered == k for k in range(1, count + 1)]
    return sorted(masks, key=lambda m: int(np.flatnonzero(m)[0]))


def box_of(mask: np.ndarray) -> Box:
    (part,) = ndimage.find_objects(mask.astype(np.int32))
    return Box(tuple(s.start for s in part), tuple(s.stop for s in part))


@st.composite
def label_maps(draw):
    """Blotches of three classes on 2D or 3D maps; some values are below 0, as nodata is."""
    shape = draw(st.sampled_from([(1, 1), (9, 1), (1, 13), (17, 12), (31, 5), (6, 5, 7), (9, 1, 4)]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    labels = rng.integers(-1, 4, shape)
    return np.where(rng.random(shape) < draw(st.floats(0, 1)), labels, 0)


@given(label_maps(), st.integers(1, 60))
@settings(max_examples=60)
def test_components_are_scipys_whatever_the_strips(labels, strip):
    found = find_components(lambda box: labels[box.slices], labels.shape, False, strip)
    masks = scipy_components(labels)
    assert len(found) == len(masks)
    for k, mask in enumerate(masks):
        assert found.value[k] == labels[mask][0]
        assert found.elements[k] == mask.sum()
        assert found.first[k] == np.flatnonzero(mask)[0]
        assert found.box(k) == box_of(mask)
    numbers = np.zeros(labels.shape, int)
    for box, part in component_strips(lambda box: labels[box.slices], labels.shape, False, found, strip):
        numbers[box.slices] = part
    for k, mask in enumerate(masks):
        np.testing.assert_array_equal(numbers == k + 1, mask)


@given(label_maps(), st.integers(1, 60))
@settings(max_examples=30)
def test_ids_are_objects_wherever_they_lie(labels, strip):
    labels = labels * 1000
    found = find_components(lambda box: labels[box.slices], labels.shape, True, strip)
    values = np.unique(labels[labels > 0])
    assert sorted(found.value.tolist()) == values.tolist()
    for k, value in enumerate(found.value.tolist()):
        assert found.elements[k] == (labels == value).sum()
        assert found.box(k) == box_of(labels == value)


@given(label_maps(), st.booleans())
@settings(max_examples=30)
def test_the_point_is_scipys_deepest(labels, ids):
    """In an image with a frame of nothing, as far from all else as any element of the component."""
    spacing = (2.5, 0.8, 1.1)[: labels.ndim]
    found = find_components(lambda box: labels[box.slices], labels.shape, ids)
    masks = scipy_components(labels)
    if ids:
        masks = sorted(
            (labels == v for v in np.unique(labels[labels > 0])), key=lambda m: int(np.flatnonzero(m)[0])
        )
    for k, mask in enumerate(masks):
        place = deepest(lambda box: labels[box.slices], found, k, ids, spacing, labels.shape)
        frame = (slice(1, -1),) * labels.ndim
        depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[frame]
        assert mask[place]
        assert depth[place] == depth.max()


def test_a_point_of_a_component_too_large_to_look_at_whole(monkeypatch):
    """A ring around a dot of the same class: the point is in the ring, not in the dot."""
    labels = np.zeros((60, 60), int)
    labels[5:55, 5:55] = 1
    labels[10:50, 10:50] = 0
    labels[28:32, 28:32] = 1
    monkeypatch.setattr(components, "STRIP", 400)
    found = find_components(lambda box: labels[box.slices], labels.shape, False)
    sizes = []

    def read(box: Box) -> np.ndarray:
        sizes.append(box.size)
        return labels[box.slices]

    places = [deepest(read, found, k, False, (1.0, 1.0), labels.shape) for k in range(2)]
    numbered, _ = ndimage.label(labels)
    assert [numbered[p] for p in places] == [1, 2]
    assert max(sizes) <= 400


def test_classes_of_a_volume(tmp_path):
    """NIfTI through nibabel: objects by connected component, names as phrases, the small one said."""
    labels = np.zeros((12, 10, 8), np.uint8)  # (i, j, k)
    labels[1:5, 2:6, 1:4] = 3
    labels[8:11, 2:6, 1:4] = 3
    labels[6, 9, 7] = 2
    affine = np.diag([1.5, 1.0, 3.0, 1.0])
    nib.Nifti1Image(labels, affine).to_filename(tmp_path / "seg.nii.gz")
    geometry = volume_geometry((8, 10, 12), affine)
    prompts, account = read_labels(
        tmp_path / "seg.nii.gz", geometry, ids=False, names={3: "lung", 2: "cyst"}, smallest=2
    )
    assert prompts.objects.tolist() == [1, 2]
    assert prompts.phrases == ("lung", "lung")
    assert prompts.boxes.start.tolist() == [[0.5, 1.5, 0.5], [0.5, 1.5, 7.5]]
    assert prompts.boxes.stop.tolist() == [[3.5, 5.5, 4.5], [3.5, 5.5, 10.5]]
    for (k, j, i), number in zip(prompts.points.position.astype(int), (1, 2), strict=True):
        assert ndimage.label(labels == 3)[0][i, j, k] == number
    assert account.remarks == ("objects of fewer than 2 elements left out: 1",)
    with pytest.raises(SceneError, match=r"prompts seg.nii.gz lie on another grid than the scene"):
        read_labels(tmp_path / "seg.nii.gz", volume_geometry((8, 10, 13), affine), ids=False)


def test_boxes_of_the_scenes_own_labels():
    """Against rasterio's polygons of the same map: their bounds are the boxes."""
    rng = np.random.default_rng(3)
    labels = (ndimage.gaussian_filter(rng.random((80, 90)), 3) > 0.5).astype(int)
    geometry = RasterGeometry(labels.shape, (10.0, 0.0, 7e5, 0.0, -10.0, 4e6), CRS(UTM).to_wkt())
    prompts, account = label_prompts(lambda box: labels[box.slices], geometry, "labels", ids=False)
    found = [
        (shapely.geometry.shape(polygon))
        for polygon, value in shapes(labels.astype(np.int32), connectivity=8)
        if value == 1
    ]
    assert len(found) == len(prompts) == account.given > 3
    boxes = np.column_stack((prompts.boxes.start, prompts.boxes.stop))[:, [1, 0, 3, 2]] + 0.5
    assert sorted(map(tuple, boxes.tolist())) == sorted(p.bounds for p in found)
    assert all(labels[int(y), int(x)] for y, x in prompts.points.position)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035", UTM])
def test_a_coarse_mask_on_another_grid(tmp_path, crs):
    """A mask of 40 × 40 elements in another CRS: rasterio's polygons of it, densified, through pyproj.

    Two ids in the scene, one beyond it. The points fall on their own ids, as rasterio samples the file.
    """
    geometry = RasterGeometry((1000, 1200), (10.0, 0.0, 7e5, 0.0, -10.0, 4e6), CRS(UTM).to_wkt())
    go = Transformer.from_crs(UTM, crs, always_xy=True)
    x0, y0, x1, y1 = go.transform_bounds(7e5 - 2000, 4e6 - 12000, 7e5 + 16000, 4e6 + 2000)
    affine = rasterio.transform.from_bounds(x0, y0, x1, y1, 40, 40)
    ids = np.zeros((40, 40), np.int32)
    row, column = rasterio.transform.rowcol(affine, *go.transform(7e5 + 4000, 4e6 - 4000))
    ids[row : row + 9, column : column + 5] = 7
    row, column = rasterio.transform.rowcol(affine, *go.transform(7e5 + 9000, 4e6 - 6000))
    ids[row : row + 3, column : column + 4] = 2
    ids[0, 0] = 5
    path = tmp_path / "coarse.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=40, count=1, dtype="int32", crs=crs, transform=affine
    ) as file:
        file.write(ids, 1)
    prompts, account = read_labels(path, geometry, ids=True)
    assert prompts.objects.tolist() == [2, 7]
    assert (account.given, len(account.used), len(account.outside)) == (3, 2, 1)
    own = {
        int(value): shapely.segmentize(shapely.geometry.shape(polygon), abs(affine.a) / 500)
        for polygon, value in shapes(ids, mask=ids > 0, transform=affine)
    }
    back = Transformer.from_crs(crs, UTM, always_xy=True)
    for k, number in enumerate((2, 7)):
        x, y = back.transform(*shapely.get_coordinates(own[number]).T)
        rows, columns = rasterio.transform.rowcol(Affine(*geometry.transform), x, y, op=lambda v: v)
        around = np.column_stack((rows, columns)) - 0.5
        np.testing.assert_allclose(prompts.boxes.start[k], around.min(axis=0), atol=2e-3)
        np.testing.assert_allclose(prompts.boxes.stop[k], around.max(axis=0), atol=2e-3)
    xs, ys = rasterio.transform.xy(Affine(*geometry.transform), *prompts.points.position.T)
    with rasterio.open(path) as file:
        sampled = [int(v[0]) for v in file.sample(zip(*go.transform(xs, ys), strict=True))]
    assert sampled == prompts.points.objects.tolist() == [2, 7]


@pytest.mark.skipif(not (DATA / "cloud_scenes").is_dir(), reason="../shared/data/cloud_scenes is absent")
def test_real_clouds():
    """Each component of a real mask: as many as scipy finds, and its point on an element of its class."""
    path = DATA / "cloud_scenes" / "sentinel2_mask.tif"
    with rasterio.open(path) as file:
        labels, crs = file.read(1).astype(int), CRS.from_wkt(file.crs.to_wkt()).to_wkt() if file.crs else None
        geometry = RasterGeometry(file.shape, tuple(file.transform)[:6], crs)
        nodata = file.nodata
    if nodata is not None:
        labels[labels == nodata] = 0
    names = {int(v): f"class {v}" for v in np.unique(labels)}
    prompts, account = read_labels(path, geometry, ids=False, names=names, smallest=64)
    sizes = np.concatenate(
        [
            np.bincount(ndimage.label(labels == v, np.ones((3, 3)))[0].ravel())[1:]
            for v in np.unique(labels[labels > 0])
        ]
    )
    print(f"{len(prompts)} of {len(sizes)} components have 64 elements: {account.remarks}")
    assert len(prompts) == int((sizes >= 64).sum()) > 0
    at = prompts.points.position.astype(int)
    assert [f"class {labels[y, x]}" for y, x in at] == list(prompts.phrases)

"""Pictures of volumes: upright, to scale, in bounded memory; bytes and archive of both kinds."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from PIL.ImageColor import getrgb

from segpipe.config.card import Class
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import volume_geometry
from segpipe.pictures.anatomical_planes import VolumePictures, structure_extents, volume_pictures
from segpipe.pictures.archive import dump_previews, load_previews
from segpipe.pictures.drawing import DIFFERENCE
from segpipe.pictures.preview import raster_preview, volume_preview
from segpipe.pictures.sampling import Plane, Readers, Stack, sample_image, sample_labels
from tests.report.drawings import BONE, GROUND, ORGAN, SHARED, decoded, panel, raster_input, reader


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
    return Readers(reader(image[None]), lambda b: labels[b.slices]), place, (GROUND, ORGAN, BONE), None


def volume(image: np.ndarray, labels: np.ndarray, place) -> VolumePictures:
    return volume_pictures(*volume_input(image, labels, place), 600, 0)


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
    monkeypatch.setattr("segpipe.pictures.sampling.SLAB_ELEMENTS", 2000)
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
    found = structure_extents(lambda b: labels[b.slices], labels.shape, classes, None)
    assert found.centre() == ((2, 4, 5), "organ")
    empty = np.zeros_like(labels)
    found = structure_extents(lambda b: empty[b.slices], labels.shape, classes, None)
    assert found.centre() == ((5, 5, 5), None)


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
    assert not (panel(result, "difference")[:, :, :3] == getrgb(DIFFERENCE["missed"][1])).all(axis=2).any()


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

"""OME-Zarr label maps, held against ome-zarr-models, the values of the scene and a count of each cell."""

from __future__ import annotations

import json
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import zarr
from finished import finish
from ome_zarr_models.v05 import ImageLabel
from world import CLASSES, OBLIQUE, World, nearest_label

from segpipe.config.card import Class
from segpipe.export.ome_zarr import level_factors, most_frequent, write_ome_zarr
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry

LISTED = [Class(**c) for c in CLASSES]


def frequent(labels: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """The most frequent label of each cell, first of equals, counted one by one; edges count twice."""
    out = np.empty([-(-n // s) for n, s in zip(labels.shape, steps, strict=True)], labels.dtype)
    for cell in np.ndindex(*out.shape):
        members = []
        for offset in product(*(range(s) for s in steps)):
            at = (c * s + o for c, s, o in zip(cell, steps, offset, strict=True))
            members.append(labels[tuple(min(a, n - 1) for a, n in zip(at, labels.shape, strict=True))])
        out[cell] = max(members, key=lambda v: (members.count(v), -members.index(v)))
    return out


@pytest.mark.parametrize(
    ("shape", "steps"), [((7, 9), (2, 2)), ((5, 6, 7), (2, 2, 2)), ((5, 6, 7), (1, 2, 2))]
)
def test_a_cell_has_its_most_frequent_label(shape: tuple[int, ...], steps: tuple[int, ...]) -> None:
    labels = np.random.default_rng(3).integers(0, 4, shape).astype(np.uint8)
    assert np.array_equal(most_frequent(labels, steps), frequent(labels, steps))


def test_levels_halve_what_is_longer_than_256() -> None:
    assert level_factors((256, 256)) == [(1, 1)]
    assert level_factors((257, 1100)) == [(1, 1), (2, 2), (2, 4), (2, 8)]
    assert level_factors((40, 512, 600)) == [(1, 1, 1), (1, 2, 2), (1, 2, 4)]


def test_of_a_volume(world: World, tmp_path: Path) -> None:
    scenes = [str(world / "volume.nii.gz")]
    job = world.job(tmp_path / "out", card="nearest-volume", scenes=scenes, outputs={"formats": ["ome-zarr"]})
    run, record = finish(job)
    group = zarr.open_group(f"{run.location}/scenes/volume/labels.ome.zarr", mode="r")
    ome = ImageLabel.from_zarr(group).attributes.ome
    assert ome.version == "0.5"
    assert [a.name for a in ome.multiscales[0].axes] == ["z", "y", "x"]
    assert {a.unit for a in ome.multiscales[0].axes} == {"millimeter"}
    values = np.asarray(group["0"][:])
    assert np.array_equal(values, nearest_label(world.voxels()).transpose(2, 1, 0))
    scale, translation = ome.multiscales[0].datasets[0].coordinateTransformations
    assert np.allclose(scale.scale, np.linalg.norm(OBLIQUE[:3, :3], axis=0)[::-1])
    assert translation.translation == [0, 0, 0]
    assert np.array_equal(group.attrs["segpipe:geometry"]["affine"], OBLIQUE.astype(np.float32))
    label = ome.image_label
    assert label is not None
    assert {c.label_value: c.rgba[:3] for c in label.colors} == {
        c["value"]: tuple(bytes.fromhex(c["color"][1:])) for c in CLASSES
    }
    raw = group.attrs["ome"]["image-label"]["properties"]
    assert {p["label-value"]: p["name"] for p in raw} == {c["value"]: c["name"] for c in CLASSES}
    assert record.scenes[0].files["ome-zarr"] == "scenes/volume/labels.ome.zarr/zarr.json"


def test_of_a_raster_with_gaps_beside_its_cog(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out", outputs={"formats": ["cog", "ome-zarr"]})
    run, _ = finish(job)
    group = zarr.open_group(f"{run.location}/scenes/scene1/labels.ome.zarr", mode="r")
    ome = ImageLabel.from_zarr(group).attributes.ome
    assert np.array_equal(np.asarray(group["0"][:]), world.labels())
    names = {p["label-value"]: p["name"] for p in group.attrs["ome"]["image-label"]["properties"]}
    assert names == {0: "ground", 1: "crop", 2: "water", 255: "no data"}
    assert [(a.name, a.unit) for a in ome.multiscales[0].axes] == [("y", "meter"), ("x", "meter")]
    assert ome.multiscales[0].datasets[0].coordinateTransformations[0].scale == [30.0, 30.0]


def test_levels_are_the_mode_of_the_one_above_and_lie_on_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    truth = np.kron(rng.integers(0, 3, (300, 350)), np.ones((9, 6), int)).astype(np.uint8)[:2600, :2070]
    geometry = RasterGeometry(truth.shape, (10.0, 0.0, 3e5, 0.0, -10.0, 5e6), None)
    write_ome_zarr(lambda box: truth[box.slices], geometry, LISTED, None, tmp_path / "a.ome.zarr")
    group = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r")
    multiscale = ImageLabel.from_zarr(group).attributes.ome.multiscales[0]
    levels = [np.asarray(group[d.path][:]) for d in multiscale.datasets]
    assert [level.shape for level in levels] == [
        (2600, 2070),
        (1300, 1035),
        (650, 518),
        (325, 259),
        (163, 130),
    ]
    assert np.array_equal(levels[0], truth)
    assert np.array_equal(levels[4], frequent(levels[3], (2, 2)))
    # without a CRS in pixels: the centre of the first element of level 2 is that of 4 × 4 elements
    assert multiscale.datasets[2].coordinateTransformations[1].translation == [1.5, 1.5]
    assert group["0"].shards == (2048, 2048)
    assert group["0"].chunks == (512, 512)


def test_half_a_map_is_never_there(tmp_path: Path) -> None:
    def fails(box: Box) -> np.ndarray:
        raise OSError("gone")

    geometry = volume_geometry((4, 5, 6), np.eye(4))
    with pytest.raises(OSError, match="gone"):
        write_ome_zarr(fails, geometry, LISTED, None, tmp_path / "a.ome.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_follow_the_map(tmp_path: Path) -> None:
    """Peaks of Python's and numpy's memory for 16 and 64 Mi elements differ by less than a shard's work."""

    def peak(edge: int) -> int:
        geometry = RasterGeometry((edge, edge), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), None)
        tracemalloc.start()
        write_ome_zarr(
            lambda box: np.full(box.shape, box.start[0] // 2048 % 3, np.uint8),
            geometry, LISTED, None, tmp_path / f"{edge}.ome.zarr",
        )  # fmt: skip
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    small, large = peak(4096), peak(8192)
    assert large < 1.3 * small + 2**20, (small, large)
    meta = json.loads((tmp_path / "8192.ome.zarr" / "zarr.json").read_text())
    assert len(meta["attributes"]["ome"]["multiscales"][0]["datasets"]) == 6

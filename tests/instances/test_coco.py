"""COCO annotations, read back by pycocotools."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from pycocotools.coco import COCO

from segpipe.export.objects import block_runs, coco_annotations
from segpipe.geometry.box import Box, grid_boxes
from tests.instances.scene import Oracle, classes_of, scene_ids, square_lattice, touching


def annotations_of(ids, objects, step, order=1):
    boxes = list(grid_boxes(ids.shape, step))[::order]
    return list(
        coco_annotations(objects, [block_runs(ids[b.slices], b, ids.shape) for b in boxes], ids.shape)
    )


def scene(shape, seed):
    truth = touching(shape, seed)
    scores = {i: 1 / (1 + i) for i in np.unique(truth).tolist()}
    lattice = square_lattice(shape, 16, 4)
    return scene_ids(Oracle(truth, lattice, classes_of(truth), scores), lattice)[:2]


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 9999), st.integers(1, 40))
def test_masks_are_read_back_by_pycocotools(shape, seed, step):
    ids, objects = scene(shape, seed)
    found = annotations_of(ids, objects, (step, max(1, step - 3)), -1)
    assert [a["id"] for a in found] == list(range(1, ids.max() + 1))
    for a in found:
        compressed = coco.frPyObjects(a["segmentation"], *shape)
        np.testing.assert_array_equal(coco.decode(compressed), ids == a["id"])
        assert a["area"] == coco.area(compressed)
        assert a["bbox"] == coco.toBbox(compressed).tolist()
        # the same bytes as from the mask: no run is cut where a block ends
        assert compressed == coco.encode(np.asfortranarray(ids == a["id"], np.uint8))
        assert sum(a["segmentation"]["counts"]) == ids.size
        assert all(n > 0 for n in a["segmentation"]["counts"][1:])
    assert found == annotations_of(ids, objects, shape)


def test_a_data_set_that_coco_opens(tmp_path):
    """Written as JSON, opened by the COCO class; scores and categories are the objects'."""
    ids, objects = scene((40, 50), 1)
    data = {
        "images": [{"id": 1, "height": 40, "width": 50}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations_of(ids, objects, (16, 16)),
    }
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(data))
    read = COCO(str(path))
    assert len(read.anns) == len(objects) > 3
    for number, a in read.anns.items():
        np.testing.assert_array_equal(read.annToMask(a), ids == number)
        assert a["category_id"] == objects.classes[number - 1]
        assert a["score"] == objects.scores[number - 1]
        assert a["iscrowd"] == 0


def test_an_object_without_a_score_has_none():
    truth = np.array([[0, 1], [0, 1]])
    lattice = square_lattice((2, 2), 8, 2)
    ids, objects, _ = scene_ids(Oracle(truth, lattice, scores={1: np.nan}), lattice)
    [found] = annotations_of(ids, objects, (1, 2))
    assert found == {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "segmentation": {"size": [2, 2], "counts": [2, 2]},
        "bbox": [1, 0, 1, 2],
        "area": 2,
        "iscrowd": 0,
    }


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int64])
def test_ids_of_any_type(dtype):
    runs = block_runs(np.array([[5, 5, 0], [5, 9, 9]], dtype), Box((10, 20), (12, 23)), (100, 50))
    assert runs.ids.tolist() == [5, 5, 9, 9]
    assert runs.start.tolist() == [2010, 2110, 2111, 2211]
    assert runs.length.tolist() == [2, 1, 1, 1]

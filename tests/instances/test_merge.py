"""Objects over windows and blocks come out as the truth: known arrays, by windows that know them."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from skimage.measure import label, regionprops

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.objects.matching import panoptic_counts, panoptic_quality
from segpipe.objects.nodes import add_nodes, box_nodes, overhang_boxes
from segpipe.objects.scene_objects import relabel
from segpipe.objects.window import WindowObjects
from segpipe.tiling.windows import make_lattice
from tests.instances.scene import (
    Oracle,
    by_first,
    classes_of,
    discs,
    scene_ids,
    square_lattice,
    touching,
)
from tests.metrics.objects import pairs_of


def assert_the_truth(truth, lattice, block=None, classes=None, **options):
    """The scene's ids are the truth's by first element, and every object has its class."""
    classes = classes or classes_of(truth)
    got, objects, _ = scene_ids(Oracle(truth, lattice, classes), lattice, block, **options)
    np.testing.assert_array_equal(got, by_first(truth))
    known, first = np.unique(truth.ravel(), return_index=True)
    ids = got.ravel()[first[known > 0]]
    assert len(objects) == len(ids)
    assert objects.classes[ids - 1].tolist() == [classes[i] for i in known[known > 0].tolist()]
    return got, objects


SHAPES = [  # scene, window, halo, stride, fixed window, block
    ((50, 61), 16, 4, 1, False, (16, 16)),  # blocks of two cells
    ((50, 61), 16, 4, 1, False, (8, 8)),  # of one
    ((50, 61), 16, 4, 1, False, (13, 21)),  # cells are shared by blocks
    ((50, 61), 16, 4, 1, False, (50, 61)),  # one block
    ((33, 47), 16, 7, 1, False, (20, 20)),  # cells of two elements: a window sees seven of them
    ((41, 39), 16, 1, 1, False, (14, 28)),  # the smallest halo
    ((45, 33), 32, 8, 8, False, (16, 33)),  # padded to the stride; the last window is shifted
    ((9, 70), 32, 4, 4, False, (9, 24)),  # one window high
    ((11, 7), 32, 8, 2, True, (5, 4)),  # one window, larger than the scene
    ((19, 21, 23), 8, 2, 1, False, (8, 9, 23)),
    ((13, 20, 11), 12, 4, 4, True, (4, 20, 5)),
]


@pytest.mark.parametrize(("shape", "window", "halo", "stride", "fixed", "block"), SHAPES)
def test_the_truth_comes_back(shape, window, halo, stride, fixed, block):
    truth = touching(shape, seed=window + halo)
    lattice = square_lattice(shape, window, halo, stride, fixed)
    got, objects = assert_the_truth(truth, lattice, block, shuffle=1)
    assert len(objects) >= 2
    classes = dict(enumerate(objects.classes.tolist(), 1)), classes_of(truth)
    quality = panoptic_quality([panoptic_counts(pairs_of(got, truth, classes))], {1, 2}, ())
    assert (quality.things.pq, quality.things.sq, quality.things.rq) == (1, 1, 1)


@st.composite
def scenes(draw):
    ndim = draw(st.sampled_from([2, 2, 3]))
    stride = draw(st.sampled_from([1, 2, 4]))
    shape = [draw(st.integers(1, 40 if ndim == 2 else 16)) for _ in range(ndim)]
    window = [stride * draw(st.integers(3, 20 // stride if ndim == 2 else 8)) for _ in range(ndim)]
    halo = [draw(st.integers(1, max(1, w // 2 - 1))) for w in window]
    block = [draw(st.integers(1, n)) for n in shape]
    assume(np.prod([-(-n // b) for n, b in zip(shape, block, strict=True)]) <= 40)
    return shape, window, halo, stride, draw(st.booleans()), block, draw(st.integers(0, 9999))


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_the_truth_comes_back_in_any_scene(scene):
    shape, window, halo, stride, fixed, block, seed = scene
    try:
        lattice = make_lattice(shape, window, halo, stride, fixed)
    except RequestError:
        assume(False)
    assume(lattice.count <= 200)
    assert_the_truth(touching(shape, seed), lattice, block, shuffle=seed)


def test_order_and_blocks_change_no_bit():
    """Every column of the results, from any blocks, in any order."""
    truth = touching((48, 60), 5)
    lattice = square_lattice(truth.shape, 16, 4)
    rng = np.random.default_rng(0)
    scores = {i: float(rng.random()) for i in np.unique(truth).tolist()}

    def answer(index):  # windows do not agree on scores
        found = oracle(index)
        return WindowObjects(found.ids, found.classes, found.scores * np.float32(1 - 0.01 * sum(index)))

    oracle = Oracle(truth, lattice, classes_of(truth), scores)
    ids, *tables = scene_ids(answer, lattice)
    for seed, block in enumerate([(8, 8), (16, 24), (7, 11), (48, 60)]):
        again, *others = scene_ids(answer, lattice, block, shuffle=seed)
        assert again.tobytes() == ids.tobytes()
        for table, other in zip(tables, others, strict=True):
            for name, column in vars(table).items():
                assert getattr(other, name).tobytes() == column.tobytes(), name


def test_two_objects_that_meet_where_four_cells_meet():
    truth = np.zeros((32, 32), int)
    truth[8:16, 8:16] = truth[16:25, 16:25] = 1  # joined at a corner
    truth[8:16, 16:24], truth[16:22, 10:16] = 2, 3
    lattice = square_lattice(truth.shape, 24, 4)
    assert lattice.owned((1, 1)).start == (16, 16)
    _, objects = assert_the_truth(truth, lattice, (16, 16))
    assert len(objects) == 3


def test_a_snake_over_twenty_cells_and_a_ring_around_one():
    truth = np.zeros((40, 80), int)
    for row in range(5):
        truth[4 + 8 * row, 2:78] = 1
        if row < 4:
            truth[4 + 8 * row : 12 + 8 * row, 77 if row % 2 == 0 else 2] = 1
    truth[9:12, 10:70], truth[25, 30] = 2, 3
    _, objects = assert_the_truth(truth, square_lattice(truth.shape, 12, 2), (16, 24))
    assert objects.elements[0] == np.count_nonzero(truth == 1)
    ring = np.zeros((40, 40), int)
    ring[10:30, 10:30] = 1
    ring[14:26, 14:26] = 0
    ring[18:22, 18:22] = 2
    lattice = square_lattice(ring.shape, 16, 4)
    assert lattice.owned((2, 2)) == Box((16, 16), (24, 24))
    _, objects = assert_the_truth(ring, lattice, (8, 8))
    assert objects.elements.tolist() == [20 * 20 - 12 * 12, 16]


def test_ten_thousand_discs():
    truth = discs((2000, 2000), 10_000, seed=0)
    assert truth.max() >= 10_000
    assert_the_truth(truth, square_lattice(truth.shape, 256, 32, 16), (500, 720), shuffle=2)


def test_what_is_known_of_each_object_is_what_scikit_image_says():
    for shape in [(50, 61), (17, 18, 19)]:
        truth = by_first(touching(shape, 3))
        got, objects = assert_the_truth(truth, square_lattice(shape, 12, 3), [11] * len(shape))
        places = regionprops(got)
        assert len(places) == len(objects) > 2
        for i, place in enumerate(places):
            assert objects.elements[i] == place.area
            assert (*objects.start[i], *objects.stop[i]) == place.bbox
            assert objects.box(i).slices == place.slice
            assert objects.first[i] == np.ravel_multi_index(tuple(place.coords.T), shape).min()
            assert objects.touches_edge[i] == (place.coords % (np.array(shape) - 1) == 0).any()
        assert objects.ids.tolist() == [p.label for p in places]


def test_small_objects_are_dropped_whole_before_ids_are_given():
    truth = discs((90, 90), 60, seed=4)
    area = np.bincount(truth.ravel())
    large = np.where(area[truth] >= 30, truth, 0)
    lattice = square_lattice(truth.shape, 24, 6)
    got, objects, lookup = scene_ids(Oracle(truth, lattice), lattice, (24, 30), minimum=30)
    np.testing.assert_array_equal(got, by_first(large))
    assert 1 < len(objects) < truth.max()
    assert objects.elements.min() >= 30
    assert lookup.final.max() == len(objects) and 0 in lookup.final


def test_stuff_of_a_class_is_one_object():
    """Classes 5 and 6 are stuff: each is one object, however many pieces it is in; 7 is a thing."""
    truth = touching((60, 60), 8, classes=5)
    classes = {i: 5 + i % 3 for i in np.unique(truth[truth > 0]).tolist()}
    of = np.vectorize(lambda i: classes.get(i, 0))(truth)
    fused = np.where(of == 7, truth, np.where(of > 0, 1000 + of, 0))
    lattice = square_lattice(truth.shape, 16, 4)
    got, objects, _ = scene_ids(Oracle(truth, lattice, classes), lattice, (20, 20), stuff=(5, 6))
    np.testing.assert_array_equal(got, by_first(fused))
    assert sorted(objects.classes[objects.classes < 7].tolist()) == [5, 6]
    assert np.count_nonzero(objects.classes == 7) > 2


def test_scores_are_means_weighted_by_elements():
    """An object of 6 columns, 4 in the left cell and 2 in the right one."""
    truth = np.zeros((8, 16), int)
    truth[:, 4:10] = 1
    lattice = square_lattice(truth.shape, 10, 1)
    assert [lattice.owned((0, i)).shape[1] for i in range(lattice.count)] == [8, 8]
    oracle = Oracle(truth, lattice)

    def answer(scores):
        def window(index):
            found = oracle(index)
            return WindowObjects(
                found.ids, found.classes, np.full(len(found.classes), scores[index[1]], "f4")
            )

        return window

    _, objects, _ = scene_ids(answer([0.25, 0.75]), lattice)
    assert objects.scores.tolist() == [(4 * 0.25 + 2 * 0.75) / 6]
    _, objects, _ = scene_ids(answer([0.25, np.nan]), lattice)
    assert np.isnan(objects.scores).all()


def pair(left, right, classes=(1, 1)):
    """Two windows of a scene of 1 × 16, each sees 12: cells 0–7 and 8–15. Runs (start, stop) by window."""
    lattice = square_lattice((1, 16), 12, 2, 1)
    assert [lattice.window((0, i)).start[1] for i in range(2)] == [0, 4]
    assert lattice.owned((0, 1)).start == (0, 8)

    def answer(index):
        runs = (left, right)[index[1]]
        line = np.zeros(16, np.int32)
        for k, (a, b) in enumerate(runs, 1):
            line[a:b] = k
        values = np.full(len(runs), classes[index[1]])
        ids = line[None, lattice.window(index).slices[1]]
        return WindowObjects(ids, values, np.full(len(runs), 0.5, np.float32))

    return scene_ids(answer, lattice)


def test_windows_that_disagree():
    """R is elements 4 to 11."""
    whole = [(6, 10)]
    ids, objects, _ = pair(whole, whole)
    assert (len(objects), ids.sum()) == (1, 4)
    # the right window does not see it: what the left one owns stays
    ids, objects, _ = pair(whole, [])
    assert ids[0].tolist() == [0] * 6 + [1, 1] + [0] * 8
    # both see it, under other classes
    ids, objects, _ = pair(whole, whole, classes=(1, 2))
    assert objects.classes.tolist() == [1, 2]
    assert ids[0, 6:10].tolist() == [1, 1, 2, 2]
    # IoU 1/2 is too little, 5/8 is enough
    assert len(pair([(4, 12)], [(8, 12)])[1]) == 2
    assert len(pair([(4, 12)], [(7, 12)])[1]) == 1
    # one whole and two halves: the larger one is the same, the smaller one does not come after it
    assert len(pair([(5, 12)], [(5, 8), (8, 12)])[1]) == 1
    # seen from both sides, but only where the other cell is: nodes are what a window owns
    ids, objects, _ = pair([(8, 11)], [(5, 8)])
    assert not ids.any() and not len(objects)
    ids, objects, _ = pair([(2, 4), (9, 11)], [(9, 11)])
    assert objects.start[:, 1].tolist() == [2, 9]


def test_area_counts_in_both_halves():
    """In the right cell both agree on 8–9; in the left one only one of them goes on, over 4–7."""
    for left, right in ([(4, 10)], [(8, 10)]), ([(7, 8), (8, 9)], [(4, 9)]):
        assert len(pair(left, right)[1]) == len(left) + len(right) - ((8, 9) in left)


def test_what_a_neighbour_cut_stays_cut():
    """Left: one object; right: two, of which the larger is the same. The other stays its own."""
    ids, objects, _ = pair([(4, 12)], [(4, 10), (10, 12)])
    assert ids[0].tolist() == [0] * 4 + [1] * 6 + [2] * 2 + [0] * 4
    assert objects.elements.tolist() == [6, 2]


def test_windows_that_see_other_borders():
    """Every other window sees discs one element smaller all around: still each disc is one object."""
    shape = (120, 130)
    yy, xx = np.ogrid[: shape[0], : shape[1]]
    truth = np.zeros(shape, int)
    centres = [(y, x + y % 4) for y in range(9, 112, 17) for x in range(9, 118, 17)]
    for i, (y, x) in enumerate(centres, 1):
        truth[(yy - y) ** 2 + (xx - x) ** 2 <= 36] = i
    small = np.where(binary_erosion(truth > 0), truth, 0)
    lattice = square_lattice(shape, 32, 8)
    models = Oracle(truth, lattice), Oracle(small, lattice)
    got, objects, _ = scene_ids(lambda i: models[sum(i) % 2](i), lattice, (32, 48))
    assert len(objects) == len(centres)
    quality = panoptic_quality([panoptic_counts(pairs_of(got, truth))], {1}, ())
    assert quality.things.rq == 1
    assert 0.8 < quality.things.sq < 1


def test_without_a_halo_objects_end_with_their_cells():
    """Cells of 12 that fill the scene: an object in three of them is three."""
    truth = touching((24, 36), 2)
    lattice = square_lattice(truth.shape, 12, 0)
    assert all(not overhang_boxes(lattice, i) for i in lattice.windows(Box.whole(truth.shape), "trim"))
    cell = np.add.outer(np.arange(24) // 12 * 3, np.arange(36) // 12)
    cut = np.where(truth > 0, truth * 6 + cell, 0)
    got, objects, _ = scene_ids(Oracle(truth, lattice), lattice, (12, 12))
    np.testing.assert_array_equal(got, by_first(cut))
    assert len(objects) > truth.max()


def test_an_empty_scene():
    lattice = square_lattice((20, 20), 8, 2)
    got, objects, lookup = scene_ids(Oracle(np.zeros((20, 20), int), lattice), lattice, (8, 8))
    assert not got.any() and not len(objects) and not len(lookup.final)
    assert objects.start.shape == (0, 2)


def test_ids_of_another_run_are_refused():
    truth = label(np.eye(20, dtype=int), connectivity=2)
    lattice = square_lattice(truth.shape, 8, 2)
    _, _, lookup = scene_ids(Oracle(truth, lattice), lattice)
    box = Box.whole(truth.shape)
    raw = np.zeros(truth.shape, np.uint32)
    raw[3, 3] = 7
    with pytest.raises(ValueError, match=r"window \(0, 0\): an id that is no node"):
        relabel(raw, box, lattice, lookup)
    raw[3, 3] = 1
    one = np.array([1]), np.array([0.5], np.float32)
    other = np.array([2]), np.array([0.5], np.float32)
    nodes = [box_nodes(raw, box, lattice, {(0, 0): table}) for table in (one, other)]
    with pytest.raises(ValueError, match="two classes or scores"):
        add_nodes(nodes, 2)

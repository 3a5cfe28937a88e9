"""The lattice, the blocks and the two grids: laws over random integers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import volume_geometry
from segpipe.geometry.grid_map import GridMap, model_grid, onto_model, onto_native
from segpipe.tiling.plan import IN_FLIGHT, Plan, Workload, make_plan
from segpipe.tiling.windows import Blocks, lattice_axis, make_lattice

MANY = settings(max_examples=100, deadline=None)
LOAD = Workload(
    image_channels=1,
    image_itemsize=1,
    channels=1,
    classes=3,
    label_itemsize=1,
    batch=1,
    keep_scores=False,
)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(size, window, halo, stride) that `make_lattice` accepts."""
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    window = stride * draw(st.integers(1, 12))
    limit = (window - stride) // 2 // stride * stride
    return draw(st.integers(1, 200)), window, draw(st.integers(0, max(0, limit))), stride


def test_lattice_by_hand() -> None:
    """A scene of 20, windows of 8, halo 2 (step 4), stride 2.

    cells    0-4   4-8   8-12  12-16  16-20
    windows  0-8   2-10  6-14  10-18  12-20   (the first and last are shifted to stay inside)
    """
    a = lattice_axis(20, 8, 2, 2)
    assert a.origins == (0, 2, 6, 10, 12)
    assert a.cuts == (0, 4, 8, 12, 16, 20)


def test_a_rest_shorter_than_the_halo_has_no_window_of_its_own() -> None:
    """A scene of 17: the cell 16-17 lies in the window 10-18 (padded to 18) of the cell before."""
    a = lattice_axis(17, 8, 2, 2)
    assert a.origins == (0, 2, 6, 10)
    assert a.cuts == (0, 4, 8, 12, 17)


@MANY
@given(axes(), st.booleans())
def test_every_element_has_one_owner_with_context(params: tuple[int, int, int, int], fixed: bool) -> None:
    size, window, halo, stride = params
    a = lattice_axis(size, window, halo, stride, fixed)
    assert a.cuts[0] == 0
    assert a.cuts[-1] == size
    assert list(a.cuts) == sorted(set(a.cuts))
    assert list(a.origins) == sorted(set(a.origins))
    for origin, low, high in zip(a.origins, a.cuts, a.cuts[1:], strict=False):
        assert origin % stride == 0
        assert 0 <= origin <= a.padded - a.window
        assert origin == 0 or low - origin >= halo
        assert origin + a.window == a.padded or origin + a.window - high >= halo
        assert origin <= low
        assert high <= origin + a.window
    assert a.padded - size < max(stride, window if fixed else 0)


@MANY
@given(axes(), st.data())
def test_owners_and_covering_are_what_they_say(
    params: tuple[int, int, int, int], data: st.DataObject
) -> None:
    a = lattice_axis(*params)
    start = data.draw(st.integers(0, a.size - 1))
    stop = data.draw(st.integers(start + 1, a.size))
    owners = {i for x in range(start, stop) for i in range(len(a.origins)) if a.cuts[i] <= x < a.cuts[i + 1]}
    assert set(a.owners(start, stop)) == owners
    covering = {i for x in range(start, stop) for i, o in enumerate(a.origins) if o <= x < o + a.window}
    assert set(a.covering(start, stop)) == covering


@MANY
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 15), st.integers(0, 4)), min_size=1, max_size=3))
def test_blocks_partition_the_scene(axes_: list[tuple[int, int, int]]) -> None:
    shape, block, absorb = (tuple(v) for v in zip(*axes_, strict=True))
    blocks = Blocks(shape, block, absorb)
    seen = np.zeros(shape, int)
    for index in blocks.indices():
        seen[blocks.box(index).slices] += 1
    assert (seen == 1).all()


@MANY
@given(st.tuples(axes(), axes()), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_no_window_twice_when_blocks_are_multiples_of_the_step(
    both: tuple[tuple[int, int, int, int], tuple[int, int, int, int]], times: tuple[int, int]
) -> None:
    """Law 4: `trim` computes each lattice window once, in one block, for halos below the step.

    (A halo of the step or more makes the first window answer for several cells, and a block that
    ends among them computes it again: `redundancy` says so, and `block: auto` avoids it.)
    """
    stride = both[0][3]
    sizes = tuple(p[0] for p in both)
    windows = [max(stride, p[1] // stride * stride) for p in both]
    halos = [
        min(p[2], max(0, (w - stride) // 3 // stride * stride)) for p, w in zip(both, windows, strict=True)
    ]
    lattice = make_lattice(sizes, windows, halos, stride)
    steps = [w - 2 * (-(-h // stride) * stride) for w, h in zip(windows, halos, strict=True)]
    grid = GridMap(sizes, Box.whole(sizes), (0, 1), (False, False), sizes, (1.0, 1.0))
    block = tuple(s * t for s, t in zip(steps, times, strict=True))
    plan = make_plan(grid, lattice, LOAD, block=block)
    needed = [w for index in plan.blocks.indices() for w in plan.windows(index)]
    assert len(needed) == len(set(needed)) == lattice.count == plan.window_passes
    assert plan.redundancy == 1.0


@settings(MANY, max_examples=30)  # every block of every plan is walked
@given(axes(), st.integers(1, 90), st.sampled_from(["trim", "gaussian"]))
def test_predicted_passes_are_the_real_ones(
    params: tuple[int, int, int, int], block: int, blend: str
) -> None:
    size, window, halo, stride = params
    lattice = make_lattice((size, size), (window, window), (halo, halo), stride)
    grid = GridMap((size, size), Box.whole((size, size)), (0, 1), (False, False), (size, size), (1.0, 1.0))
    plan = make_plan(grid, lattice, LOAD, blend=blend, block=(block, block))
    assert plan.window_passes == sum(len(plan.windows(i)) for i in plan.blocks.indices())
    for index in plan.blocks.indices():
        read = plan.read_box(index)
        for w in plan.windows(index):
            assert read.contains(lattice.window(w).intersect(Box.whole(lattice.shape)))


@pytest.mark.parametrize("blend", ["trim", "gaussian"])
@pytest.mark.parametrize("size", [300, 4096, 10980])
def test_auto_blocks_keep_redundancy_and_memory(blend: str, size: int) -> None:
    shape = (size, size)
    lattice = make_lattice(shape, (512, 512), (64, 64), 32)
    grid = GridMap(shape, Box.whole(shape), (0, 1), (False, False), shape, (1.0, 1.0))
    plan = make_plan(grid, lattice, LOAD, blend=blend, memory=8 * 1024**3)
    assert plan.redundancy <= 1.15
    assert plan.memory.total <= 8 * 1024**3


def test_memory_does_not_grow_with_the_scene() -> None:
    """Law 3: the prediction is flat from 4k² to 64k²."""
    totals = []
    for size in (4096, 16384, 65536):
        lattice = make_lattice((size, size), (512, 512), (64, 64), 32)
        grid = GridMap(
            (size, size), Box.whole((size, size)), (0, 1), (False, False), (size, size), (1.0, 1.0)
        )
        totals.append(make_plan(grid, lattice, LOAD).memory.total)
    assert totals[0] <= totals[1] == totals[2]


def test_a_bound_that_cannot_be_met_says_why() -> None:
    lattice = make_lattice((4096, 4096), (512, 512), (64, 64), 32)
    grid = GridMap((4096, 4096), Box.whole((4096, 4096)), (0, 1), (False, False), (4096, 4096), (1.0, 1.0))
    with pytest.raises(RequestError, match=r"tiling.memory: found 512 MiB.*forward \d+ MiB"):
        make_plan(grid, lattice, LOAD, memory=512 * 1024**2)


@pytest.mark.parametrize(
    ("window", "halo", "message"),
    [(500, 64, "multiple of the model's total stride 32"), (512, 256, "valid: 0 to 224")],
)
def test_impossible_windows_are_refused(window: int, halo: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_lattice((4096, 4096), (window, window), (halo, halo), 32)


# -- two grids ----------------------------------------------------------------------------------


def test_coordinates_follow_the_voxel_centre_convention() -> None:
    """1 mm onto 2 mm: the first model centre lies between native voxels 0 and 1."""
    geometry = volume_geometry((8, 8, 8), np.diag([1.0, 1.0, 1.0, 1.0]))
    grid = model_grid(geometry, spacing=[2, 2, 2])
    assert grid.shape == (4, 4, 4)
    np.testing.assert_array_equal(grid.to_native(0, 0, 4), [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_array_equal(grid.to_model(0, 0, 3), [0.0, 0.25, 0.75])


@pytest.mark.parametrize("perm", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product([1, -1], repeat=3)))
def test_orientation_agrees_with_nibabel(perm: tuple[int, ...], signs: tuple[int, ...]) -> None:
    """The array on a RAS grid equals nibabel's closest canonical image, for all 48 orientations."""
    import nibabel as nib

    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(perm)] * np.array(signs)
    data = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    geometry = volume_geometry(data.shape[::-1], affine)
    grid = model_grid(geometry, orientation="RAS")
    values = onto_model(data.T[None], geometry.box, grid, Box.whole(grid.shape))
    expected = nib.as_closest_canonical(nib.Nifti1Image(data, affine)).get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(values[0], expected)
    back = onto_native(values, Box.whole(grid.shape), grid, geometry.box)
    np.testing.assert_array_equal(back[0], data.T)


@st.composite
def grids(draw: st.DrawFn) -> GridMap:
    shape = tuple(draw(st.integers(2, 12)) for _ in range(3))
    affine = np.diag([*draw(st.tuples(*[st.sampled_from([0.7, -1.0, 1.3, 2.0])] * 3)), 1.0])
    geometry = volume_geometry(shape, affine)
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    crop = draw(st.sampled_from([None, Box(start, stop)]))
    orientation = draw(st.sampled_from(["RAS", "LPI", "SRA", None]))
    spacing = draw(st.sampled_from([[1.0, 1.0, 1.0], [0.5, 1.5, 3.0]]))
    return model_grid(geometry, orientation=orientation, spacing=spacing, crop=crop)


def boxes(draw: st.DrawFn, within: Box) -> Box:
    start = tuple(draw(st.integers(a, b - 1)) for a, b in zip(within.start, within.stop, strict=True))
    return Box(start, tuple(draw(st.integers(a + 1, b)) for a, b in zip(start, within.stop, strict=True)))


@MANY
@given(grids(), st.data(), st.booleans())
def test_a_piece_resampled_alone_equals_the_piece_of_the_whole(
    grid: GridMap, data: st.DataObject, nearest: bool
) -> None:
    rng = np.random.default_rng(0)
    native = rng.normal(size=(2, *grid.native_shape)).astype(np.float32)
    everything = Box.whole(grid.shape)
    whole = onto_model(native, Box.whole(grid.native_shape), grid, everything, nearest=nearest)
    part = boxes(data.draw, everything)
    need = grid.native_box(part)
    alone = onto_model(native[(slice(None), *need.slices)], need, grid, part, nearest=nearest)
    np.testing.assert_array_equal(alone, whole[(slice(None), *part.slices)])

    back = onto_native(whole, everything, grid, grid.crop, nearest=nearest)
    target = boxes(data.draw, grid.crop)
    need = grid.model_box(target)
    alone = onto_native(whole[(slice(None), *need.slices)], need, grid, target, nearest=nearest)
    np.testing.assert_array_equal(alone, back[(slice(None), *target.within(grid.crop))])


@MANY
@given(grids())
def test_linear_resampling_is_exact_on_a_ramp(grid: GridMap) -> None:
    """A linear function of the native coordinates is itself at every model centre."""
    coordinates = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in grid.native_shape], indexing="ij")
    ramp = np.stack(coordinates)
    values = onto_model(ramp, Box.whole(grid.native_shape), grid, Box.whole(grid.shape))
    for axis, native in enumerate(grid.axes):
        expected = grid.to_native(axis, 0, grid.shape[axis])
        line = np.moveaxis(values[native], axis, 0).reshape(grid.shape[axis], -1)
        np.testing.assert_allclose(line, np.repeat(expected[:, None], line.shape[1], 1), atol=1e-5)


def test_nearest_onto_a_fixed_shape_is_torch_nearest_exact() -> None:
    """The outside oracle of the convention, over sizes where ties could hide."""
    torch = pytest.importorskip("torch")
    for n, m in itertools.product([*range(1, 40), 75, 150, 151, 168, 170, 197, 214, 233], [64, 128, 256]):
        geometry = volume_geometry((1, 1, n), np.eye(4))
        grid = model_grid(geometry, shape=[1, 1, m])
        x = np.arange(n, dtype=np.float32).reshape(1, 1, 1, n)
        ours = onto_model(x, geometry.box, grid, Box.whole(grid.shape), nearest=True).ravel()
        theirs = torch.nn.functional.interpolate(torch.from_numpy(x[0]), size=m, mode="nearest-exact")
        np.testing.assert_array_equal(ours, theirs.numpy().ravel(), err_msg=f"{n} → {m}")
        y = np.arange(m, dtype=np.float32).reshape(1, 1, 1, m)
        ours = onto_native(y, Box.whole(grid.shape), grid, geometry.box, nearest=True).ravel()
        theirs = torch.nn.functional.interpolate(torch.from_numpy(y[0]), size=n, mode="nearest-exact")
        np.testing.assert_array_equal(ours, theirs.numpy().ravel(), err_msg=f"{m} → {n}")


def test_needed_memory_is_counted_in_every_part() -> None:
    lattice = make_lattice((4096, 4096), (512, 512), (64, 64), 32)
    grid = GridMap((4096, 4096), Box.whole((4096, 4096)), (0, 1), (False, False), (4096, 4096), (1.0, 1.0))
    parts = make_plan(grid, lattice, LOAD).memory
    assert parts.total == sum(vars(parts).values())  # nothing to clean up
    cleaned = make_plan(grid, lattice, replace(LOAD, cleanup=True), memory=2**40).memory
    assert cleaned.cleanup == 20 * 4096**2


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Small plans over volumes: crops, flips, resampled, sampled onto a shape, or none of these."""
    native = tuple(draw(st.integers(1, 40)) for _ in range(3))
    crop = None
    if draw(st.booleans()):
        lows = [draw(st.integers(0, n - 1)) for n in native]
        highs = [draw(st.integers(a + 1, n)) for a, n in zip(lows, native, strict=True)]
        crop = Box(tuple(lows), tuple(highs))
    grid = model_grid(
        volume_geometry(native, np.diag([1.0, 1.5, 2.0, 1.0])),
        orientation=draw(st.sampled_from([None, "RAS", "LPS", "SRA"])),
        crop=crop,
        **draw(  # type: ignore[arg-type]
            st.sampled_from([{}, {"spacing": [1.3, 2.6, 0.9]}, {"spacing": [4, 4, 4]}, {"shape": [7, 12, 9]}])
        ),
    )
    stride = draw(st.sampled_from([1, 2, 4]))
    window = stride * draw(st.integers(3, 6))
    halo = stride * draw(st.integers(0, 1))
    keep_scores = draw(st.booleans())
    load = replace(LOAD, image_channels=2, image_itemsize=2, channels=2, keep_scores=keep_scores)
    plan = make_plan(
        grid,
        make_lattice(grid.shape, [window] * 3, [halo] * 3, stride),
        load,
        blend=draw(st.sampled_from(["trim", "gaussian"])),
        block=[draw(st.integers(3, 25)) for _ in range(3)],
        memory=2**50,
    )
    assume(plan.blocks.count <= 1000)
    return plan


@settings(max_examples=60, deadline=None)
@given(plans())
def test_predicted_memory_holds_for_every_block(plan: Plan) -> None:
    """Against the largest read and the largest model region of all blocks, one after another."""
    per_element = 2 * 2 + 1 + 2 * 8  # as stored, validity, float32 before and after a step
    read = max(plan.read_box(i).size for i in plan.blocks.indices())
    assert plan.memory.read >= IN_FLIGHT * read * per_element
    model = max(plan.grid.model_box(plan.blocks.box(i)).size for i in plan.blocks.indices())
    block = max(plan.blocks.box(i).size for i in plan.blocks.indices())
    direct = plan.grid.identity and plan.blend == "trim"
    merged = model * (1 if direct else 4 * (3 + 1))  # labels, or scores and weights
    scores = 3 * 4 * block if plan.workload.keep_scores and not (plan.grid.identity and not direct) else 0
    assert plan.memory.scores >= IN_FLIGHT * (merged + block + scores)


@given(data=st.data())
def test_boxes_follow_from_their_ends(data: st.DataObject) -> None:
    """As from the place of every element: a million rows are planned from the ends of their blocks."""
    native = data.draw(st.integers(1, 300))
    low = data.draw(st.integers(0, native - 1))
    high = data.draw(st.integers(low + 1, native))
    size = data.draw(st.integers(1, 400))
    grid = GridMap(
        (native,), Box((low,), (high,)), (0,), (data.draw(st.booleans()),), (size,), ((high - low) / size,)
    )
    start = data.draw(st.integers(low, high - 1))
    stop = data.draw(st.integers(start + 1, high))
    found = grid.model_box(Box((start,), (stop,)))
    at, nearest = grid.to_model(0, start, stop), grid.nearest_model(0, start, stop)
    assert found.start == (min(int(np.floor(at.min())), int(nearest.min())),)
    assert found.stop == (max(int(np.ceil(at.max())), int(nearest.max())) + 1,)

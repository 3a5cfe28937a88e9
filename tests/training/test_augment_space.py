"""Where things go. Oracles: numpy's flips, scipy's affine transform, rotations and spheres by analysis.

Bands that hold the coordinates of their own elements are interpolated exactly, so the output says where each
element came from, whatever the code believes.
"""

import numpy as np
import pytest
import torch
from scipy import ndimage

from segpipe.config.recipe import Augmentation
from segpipe.training.augmentation import CELLS, augment, sampling_grid
from tests.training.no_augmentation import NONE

pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**fields: object) -> Augmentation:
    return Augmentation(**{**NONE.model_dump(), **fields})


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth random image, float32, standard deviation 1."""
    image = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return (image / image.std()).astype(np.float32)


def coordinates(shape: tuple[int, ...]) -> np.ndarray:
    """(axis + 1, *shape): each element's offset from the centre, and a band of ones."""
    axes = [np.arange(size) - (size - 1) / 2 for size in shape]
    return np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones(shape)]).astype(np.float32)


def sources(
    shape: tuple[int, ...], seed: int, chosen: Augmentation, **more: object
) -> tuple[np.ndarray, np.ndarray]:
    """For each output element its source's offset from the centre, and whether all of it is inside."""
    target = torch.zeros(shape, dtype=torch.int64)
    moved, _ = augment(
        torch.from_numpy(coordinates(shape)), target, chosen, np.random.default_rng(seed), **more
    )
    return moved[:-1].numpy(), (moved[-1] > 1 - 1e-5).numpy()


def fitted_matrix(shape: tuple[int, ...], seed: int, chosen: Augmentation, **more: object) -> np.ndarray:
    """The matrix that takes output offsets to input offsets, fitted; it fits everywhere and has no shift."""
    seen, inside = sources(shape, seed, chosen, **more)
    here = np.vstack([coordinates(shape)[:-1][:, inside], np.ones(inside.sum())])
    fit = np.linalg.lstsq(here.T, seen[:, inside].T, rcond=None)[0].T
    assert np.abs(fit @ here - seen[:, inside]).max() < 1e-3
    assert np.abs(fit[:, -1]).max() < 1e-3
    return fit[:, :-1]


def scipy_moved(image: np.ndarray, matrix: np.ndarray, order: int, outside: float) -> np.ndarray:
    centre = (np.asarray(image.shape) - 1) / 2
    return ndimage.affine_transform(
        image, matrix, centre - matrix @ centre, order=order, mode="grid-constant", cval=outside
    )


@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 7), [0]), ((5, 7), [1]), ((4, 5, 6), [0, 2]), ((4, 5, 6), [])]
)
def test_mirror_is_numpys_flip(shape: tuple[int, ...], axes: list[int]) -> None:
    image, target = np.random.rand(3, *shape).astype(np.float32), np.random.randint(0, 9, shape)
    got, labels = augment(
        torch.from_numpy(image),
        torch.from_numpy(target),
        spec(flip=1, flip_axes=axes),
        np.random.default_rng(),
    )
    space = axes or list(range(len(shape)))
    assert np.array_equal(got, np.flip(image, [axis + 1 for axis in space]))
    assert np.array_equal(labels, np.flip(target, space))


def test_each_axis_is_mirrored_with_its_probability_on_its_own() -> None:
    target, rng, draws = torch.arange(4).reshape(2, 2), np.random.default_rng(1), 600
    seen = [
        tuple(augment(target[None].float(), target, spec(flip=0.5), rng)[1][0].tolist()) for _ in range(draws)
    ]
    for first_row in [(0, 1), (1, 0), (2, 3), (3, 2)]:  # none, x, y, both: a quarter each
        assert abs(seen.count(first_row) - draws / 4) < 5 * (draws * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    ("shape", "spacing", "turns"),
    [
        ((6, 6), None, {1, 2, 3}),
        ((2, 5, 5), (3, 1, 1), {1, 2, 3}),
        ((4, 6), None, {2}),
        ((6, 6), (1, 2), {2}),
    ],
)
def test_quarter_turns_are_numpys_rot90(
    shape: tuple[int, ...], spacing: tuple[float, ...] | None, turns: set[int]
) -> None:
    image, target = np.random.rand(2, *shape).astype(np.float32), np.arange(np.prod(shape)).reshape(shape)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        got, labels = augment(
            torch.from_numpy(image), torch.from_numpy(target), spec(rotate90=1), rng, spacing=spacing
        )
        (found,) = (k for k in turns if np.array_equal(labels, np.rot90(target, k, (-2, -1))))
        assert np.array_equal(got, np.rot90(image, found, (-2, -1)))
        seen.add(found)
    assert seen == turns


@pytest.mark.parametrize("shape", [(33, 40), (17, 24, 21)])
@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_known_factor_is_scipys_affine_transform(shape: tuple[int, ...], factor: float) -> None:
    image = blobs(shape)
    got, _ = augment(
        torch.from_numpy(image[None]),
        torch.zeros(shape, dtype=torch.int64),
        spec(scale=1, scale_range=[factor, factor]),
        np.random.default_rng(0),
    )
    assert np.abs(got[0].numpy() - scipy_moved(image, np.eye(len(shape)) / factor, 1, 0)).max() < 1e-4


@pytest.mark.parametrize("spacing", [(1, 1), (2, 0.5), (1, 1, 1), (3, 1, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_a_rotation_is_one_in_physical_space(spacing: tuple[float, ...], seed: int) -> None:
    shape = (31, 36) if len(spacing) == 2 else (19, 24, 21)
    chosen = spec(rotate=1, degrees=20)
    matrix = fitted_matrix(shape, seed, chosen, spacing=spacing)
    turn = np.diag(spacing) @ matrix @ np.diag(1 / np.asarray(spacing))
    assert np.abs(turn @ turn.T - np.eye(len(shape))).max() < 1e-3
    assert np.linalg.det(turn) == pytest.approx(1, abs=1e-3)
    cosine = turn[0, 0] if len(shape) == 2 else (np.trace(turn) - 1) / 2
    assert 0.01 < np.degrees(np.arccos(cosine)) < 20 * (1 if len(shape) == 2 else 3)

    image, target = blobs(shape), np.random.default_rng(seed).integers(0, 5, shape)
    got, labels = augment(
        torch.from_numpy(image[None]),
        torch.from_numpy(target),
        chosen,
        np.random.default_rng(seed),
        spacing=spacing,
        outside=-7,
    )
    assert np.abs(got[0].numpy() - scipy_moved(image, matrix, 1, 0)).max() < 1e-3  # the fit's share
    same = labels.numpy() == scipy_moved(target, matrix, 0, -7)
    assert same.mean() > 0.999  # the rest lies half-way between two elements


def test_rotations_in_a_plane_reach_both_sides_up_to_the_limit() -> None:
    chosen = spec(rotate=1, degrees=30)
    matrices = [fitted_matrix((12, 12), seed, chosen) for seed in range(200)]
    angles = np.degrees([np.arctan2(matrix[1, 0], matrix[0, 0]) for matrix in matrices])
    assert np.abs(angles).max() < 30.01
    assert angles.min() < -25
    assert angles.max() > 25


def test_factors_are_uniform_on_a_log_scale() -> None:
    chosen = spec(scale=1, scale_range=[0.5, 2])
    logs = [-np.log2(fitted_matrix((8, 8), seed, chosen)[0, 0]) for seed in range(300)]
    assert np.abs(logs).max() < 1.01
    assert np.mean(logs) == pytest.approx(0, abs=5 * (1 / 3 / 300) ** 0.5)
    assert np.std(logs) == pytest.approx(3**-0.5, rel=0.15)


def test_a_sphere_of_anisotropic_voxels_stays_one() -> None:
    spacing, shape = (3.0, 1.0, 1.0), (17, 51, 51)
    offsets = coordinates(shape)[:-1] * np.reshape(spacing, (3, 1, 1, 1))
    radius = np.sqrt((offsets**2).sum(0))
    image = torch.from_numpy(np.exp(-(radius**2) / (2 * 9**2)).astype(np.float32))
    target = torch.from_numpy((radius < 14).astype(np.int64))
    chosen, seeds = spec(rotate=1, degrees=60), range(5)
    for seed in seeds:
        got, labels = augment(image[None], target, chosen, np.random.default_rng(seed), spacing=spacing)
        inside = labels >= 0
        # linear interpolation errs by at most h² / 8 times the second derivative (1 / σ²), along each axis
        assert (got[0] - image)[inside].abs().max() < (9 + 1 + 1) / 8 / 9**2
        assert (labels == 1).sum() * 3 == pytest.approx(4 / 3 * np.pi * 14**3, rel=0.05)
    wrong = [
        augment(image[None], target, chosen, np.random.default_rng(seed))[0][0] - image for seed in seeds
    ]
    assert max(difference.abs().max() for difference in wrong) > 0.2  # without the spacing it does not


@pytest.mark.parametrize("shape", [(48, 40), (20, 24, 28)])
def test_labels_go_where_the_image_goes(shape: tuple[int, ...]) -> None:
    target = torch.from_numpy(np.digitize(blobs(shape), [-1, 0, 1]))
    image = torch.stack([(target == value).float() for value in range(4)])
    everything = spec(flip=0.5, rotate90=0.5, rotate=1, scale=1, elastic=1)
    for seed in range(5):
        moved, labels = augment(image, target, everything, np.random.default_rng(seed))
        certain = moved.amax(0) > 0.999  # all neighbours are of one class
        assert certain.float().mean() > 0.05
        assert torch.equal(labels[certain], moved.argmax(0)[certain])
        blank = moved.sum(0) == 0
        assert (labels[blank] == -1).all()


def test_what_comes_from_outside_is_zero_and_ignored() -> None:
    image, target = torch.ones(2, 40, 40), torch.ones(40, 40, dtype=torch.int64)
    chosen = spec(scale=1, scale_range=[0.5, 0.5])
    got, labels = augment(image, target, chosen, np.random.default_rng(0), outside=-100)
    assert (labels[10:30, 10:30] == 1).all()  # half the size: the middle 20 × 20
    assert (labels == -100).sum() == 40 * 40 - 20 * 20
    assert torch.equal(got[:, 10:30, 10:30], torch.ones(2, 20, 20))
    assert (got[:, labels == -100] == 0).all()


def jacobians(seen: np.ndarray) -> np.ndarray:
    """Determinants of the map's derivative, by differences between neighbours; NaN are left out."""
    shape = [size - 1 for size in seen.shape[1:]]
    steps = [np.diff(seen, axis=axis)[:, *map(slice, shape)] for axis in range(1, seen.ndim)]
    derivatives = np.moveaxis(np.stack(steps), (0, 1), (-2, -1))
    return np.linalg.det(derivatives[np.isfinite(derivatives).all((-2, -1))])


@pytest.mark.parametrize("shape", [(64, 48), (24, 32, 28)])
@pytest.mark.parametrize("size", [0.05, 0.1])
def test_elastic_shifts_are_bounded_and_fold_nothing(shape: tuple[int, ...], size: float) -> None:
    elastic = {"elastic": 1, "elastic_size": size}
    for seed in range(6):
        seen, inside = sources(shape, seed, spec(**elastic))
        shift = seen - coordinates(shape)[:-1]
        for axis, length in enumerate(shape):
            largest = np.abs(shift[axis][inside]).max()
            assert 0.1 * size * length < largest <= size * length + 1e-3
        for chosen in (spec(**elastic), spec(**elastic, rotate=1, scale=1)):
            seen, inside = sources(shape, seed, chosen)
            determinants = jacobians(np.where(inside, seen, np.nan))
            assert determinants.min() > 0
            assert determinants.size > 0.2 * np.prod(shape)


@pytest.mark.parametrize("shape", [(9, 14), (5, 8, 6)])
def test_control_points_that_lie_linearly_are_a_matrix(shape: tuple[int, ...]) -> None:
    """Cubic B-splines reproduce linear functions; control point k is k - 1 cells from the window's edge."""
    ndim = len(shape)
    linear = np.random.default_rng(0).uniform(-0.1, 0.1, (ndim, ndim))
    share = (np.arange(CELLS + 3) - 1) / CELLS - 0.5
    places = np.stack(np.meshgrid(*[share] * ndim, indexing="ij"), axis=-1)
    extent = np.asarray(shape, float)
    matrix = np.eye(ndim) + linear * extent[:, None] / extent[None, :]
    splines = sampling_grid(shape, None, places @ linear.T)
    assert (splines - sampling_grid(shape, matrix, None)).abs().max() < 1e-6


@pytest.mark.parametrize(("shape", "spacing"), [((40, 28), (1, 2)), ((20, 26, 16), (3, 1, 2))])
def test_elastic_shifts_come_before_rotation_and_scaling(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """One state, three specs: an element p sees M (p + d), with M from one alone and p + d from the other."""
    both = spec(elastic=1, rotate=1, degrees=25, scale=1, scale_range=[1.2, 1.2])
    still = both.model_copy(update={"degrees": 0.0, "scale_range": [1.0, 1.0]})
    alone = both.model_copy(update={"elastic": 0.0})
    for seed in range(4):
        seen, inside = sources(shape, seed, both, spacing=spacing)
        shifted, also = sources(shape, seed, still, spacing=spacing)
        expected = np.tensordot(fitted_matrix(shape, seed, alone, spacing=spacing), shifted, 1)
        assert (inside & also).mean() > 0.3
        assert np.abs(seen - expected)[:, inside & also].max() < 5e-3


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 32)])
def test_the_worst_lattices_fold_nothing(shape: tuple[int, ...]) -> None:
    """Choi and Lee's bound at its edge: every control point at ±0.1 on every axis."""
    rng, ndim = np.random.default_rng(0), len(shape)
    for _ in range(10):
        lattice = rng.choice([-0.1, 0.1], (CELLS + 3,) * ndim + (ndim,))
        grid = sampling_grid(shape, None, lattice)[0].numpy()[..., ::-1]
        seen = np.moveaxis(grid, -1, 0) * np.reshape(shape, (ndim,) + (1,) * ndim) / 2
        assert jacobians(seen).min() > 0


def test_elastic_shifts_vary_as_a_cubic_b_spline_of_uniform_points_does() -> None:
    """At a knot the weights are 1/6, 4/6, 1/6 along each axis: the variance is size² / 3 · (1/2)²."""
    chosen, shape = spec(elastic=1, elastic_size=0.08), (25, 25)
    middle = np.array([sources(shape, seed, chosen)[0][:, 12, 12] for seed in range(300)])
    assert middle.std() == pytest.approx(0.08 * 25 / 3**0.5 / 2, rel=0.12)
    assert abs(middle.mean()) < 5 * middle.std() / 600**0.5

"""What values become: gain, shift, power, noise, blur and resolution by analysis, numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from segpipe.config.recipe import Augmentation
from segpipe.training.augmentation import augment
from tests.training.no_augmentation import NONE


def changed(image: np.ndarray, seed: int = 0, **fields: object) -> np.ndarray:
    chosen = Augmentation(**{**NONE.model_dump(), **fields})
    target = torch.zeros(image.shape[1:], dtype=torch.int64)
    got, labels = augment(torch.from_numpy(image), target, chosen, np.random.default_rng(seed))
    assert torch.equal(labels, target)
    assert got.dtype == torch.float32
    return got.numpy()


@pytest.fixture(params=[(3, 40, 50), (2, 16, 20, 12)])
def image(request: pytest.FixtureRequest) -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.standard_normal(request.param) * 2 + 1).astype(np.float32)


def test_brightness_shifts(image: np.ndarray) -> None:
    got = changed(image, brightness=1, brightness_range=[0.25, 0.25])
    assert np.array_equal(got, image + np.float32(0.25))


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_contrast_keeps_means_and_scales_deviations(image: np.ndarray, factor: float) -> None:
    got, space = changed(image, contrast=1, contrast_range=[factor, factor]), tuple(range(1, image.ndim))
    assert got.mean(space) == pytest.approx(image.mean(space), abs=1e-5)
    assert got.std(space) == pytest.approx(factor * image.std(space), rel=1e-5)


@pytest.mark.parametrize("exponent", [0.7, 2.0])
def test_gamma_is_a_power_between_the_extremes(exponent: float) -> None:
    ramp = np.linspace(0, 1, 101, dtype=np.float32).reshape(1, 1, 101)
    got = changed(5 * ramp - 2, gamma=1, gamma_range=[exponent, exponent])
    assert got == pytest.approx(5 * ramp**exponent - 2, abs=1e-5)


def test_gamma_leaves_a_band_of_one_value(image: np.ndarray) -> None:
    image[0] = 4
    got, space = changed(image, gamma=1), tuple(range(1, image.ndim))
    assert np.array_equal(got[0], image[0])
    assert not np.array_equal(got[1], image[1])
    assert got.min(space) == pytest.approx(image.min(space), abs=1e-5)
    assert got.max(space) == pytest.approx(image.max(space), abs=1e-5)


def test_noise_is_gaussian_and_independent() -> None:
    image = np.full((2, 200, 200), 3, np.float32)
    noise = changed(image, noise=1, noise_range=[0.5, 0.5]) - image
    count = noise[0].size
    assert noise.mean((1, 2)) == pytest.approx(0, abs=5 * 0.5 / count**0.5)
    assert noise.std((1, 2)) == pytest.approx(0.5, rel=5 / (2 * count) ** 0.5)
    pairs = [(noise[0], noise[1]), (noise[0, 1:], noise[0, :-1]), (noise[0, :, 1:], noise[0, :, :-1])]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / count**0.5
    assert np.mean(np.abs(noise) < 0.5) == pytest.approx(0.6827, abs=5 * 0.5 / (2 * count) ** 0.5)


@pytest.mark.parametrize("shape", [(31, 33), (21, 23, 25)])
def test_blur_spreads_a_point_by_its_variance(shape: tuple[int, ...]) -> None:
    middle = tuple(size // 2 for size in shape)
    image = np.zeros((2, *shape), np.float32)
    image[(0, *middle)] = 1
    image[1] = 7
    got = changed(image, blur=1, blur_range=[1.5, 1.5])
    assert got[0].sum() == pytest.approx(1, abs=1e-5)
    for axis, size in enumerate(shape):
        profile = got[0].sum(tuple(other for other in range(len(shape)) if other != axis))
        assert profile @ (np.arange(size) - middle[axis]) ** 2 == pytest.approx(1.5**2, rel=0.01)
    assert got[1] == pytest.approx(7, abs=1e-5)  # nor do bands mix, and borders stay


@pytest.mark.parametrize("shape", [(24, 36), (8, 12, 20)])
def test_low_resolution_is_block_means_interpolated(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    got = changed(image, low_resolution=1, low_resolution_range=[0.5, 0.5])
    for band, seen in zip(image, got, strict=True):
        pairs = [number for size in shape for number in (size // 2, 2)]
        means = band.reshape(pairs).mean(tuple(range(1, len(pairs), 2)))
        expected = ndimage.zoom(means, 2, order=1, mode="nearest", grid_mode=True)
        assert seen == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("field", ["brightness", "contrast", "gamma"])
def test_bands_differ_or_are_alike(field: str) -> None:
    band = np.random.default_rng(0).standard_normal((1, 20, 20)).astype(np.float32)
    image = np.repeat(band, 4, axis=0)
    alike = changed(image, bands_alike=True, **{field: 1})
    assert np.abs(alike - alike[:1]).max() < 1e-6
    assert np.abs(alike - image).max() > 1e-3
    apart = changed(image, **{field: 1})
    assert len({float(value) for value in apart[:, 3, 3]}) == 4


def test_draws_fill_their_range() -> None:
    image = np.zeros((1000, 2, 2), np.float32)
    shifts = changed(image, brightness=1, brightness_range=[-0.2, 0.6])[:, 0, 0]
    assert shifts.min() == pytest.approx(-0.2, abs=0.02)
    assert shifts.max() == pytest.approx(0.6, abs=0.02)
    assert shifts.mean() == pytest.approx(0.2, abs=5 * 0.8 / 12**0.5 / 1000**0.5)

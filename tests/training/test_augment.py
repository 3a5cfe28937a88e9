"""The whole draw: shapes, determinism, nothing changed in place, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from segpipe.config.recipe import Augmentation
from segpipe.errors import RequestError
from segpipe.training.augmentation import augment
from tests.training.no_augmentation import NONE

ALWAYS = Augmentation(
    **{name: 1.0 for name, value in NONE.model_dump().items() if value == 0.0 and not isinstance(value, bool)}
)


pytestmark = pytest.mark.usefixtures("one_thread")


def window(shape: tuple[int, ...], bands: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((bands, *shape)).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(rng.integers(-1, 5, shape))


def test_always_has_all_eleven_kinds() -> None:
    fields = ALWAYS.model_dump()
    assert sum(value == 1.0 and not isinstance(value, bool) for value in fields.values()) == 11


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 17), min_size=2, max_size=3).map(tuple),
    bands=st.integers(1, 13),
    seed=st.integers(0, 2**32 - 1),
    spec=st.sampled_from([ALWAYS, Augmentation()]),
)
def test_any_shape_and_band_count(shape: tuple[int, ...], bands: int, seed: int, spec: Augmentation) -> None:
    image, target = window(shape, bands)
    before = image.clone(), target.clone()
    got, labels = augment(image, target, spec, np.random.default_rng(seed), outside=-9)
    assert (got.shape, got.dtype) == (image.shape, torch.float32)
    assert (labels.shape, labels.dtype) == (target.shape, torch.int64)
    assert torch.isfinite(got).all()
    assert set(labels.unique().tolist()) <= {*target.unique().tolist(), -9}
    assert torch.equal(image, before[0])
    assert torch.equal(target, before[1])

    torch.manual_seed(seed % 7)
    again, labels_again = augment(image, target, spec, np.random.default_rng(seed), outside=-9)
    assert torch.equal(got, again)
    assert torch.equal(labels, labels_again)


def test_another_state_gives_another_draw() -> None:
    image, target = window((12, 12))
    rng = np.random.default_rng(0)
    one, two = (augment(image, target, ALWAYS, rng)[0] for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 7)])
def test_none_is_the_identity(shape: tuple[int, ...]) -> None:
    image, target = window(shape, bands=3)
    image[0].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    for seed in range(5):
        got, labels = augment(image, target, NONE, np.random.default_rng(seed))
        assert got.numpy().tobytes() == image.numpy().tobytes()
        assert torch.equal(labels, target)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"flip_axes": [3]}, "less than or equal to 2"),
        ({"elastic_size": 0.2}, "less than or equal to 0.1"),
        ({"scale_range": [1.4, 0.7]}, "the smaller number first"),
        ({"scale_range": [0, 1]}, "greater than 0"),
        ({"gamma_range": [1.0]}, "at least 2 items"),
        ({"low_resolution_range": [0.5, 2]}, "numbers up to 1"),
        ({"mirror": 1}, "Extra inputs"),
    ],
)
def test_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Augmentation(**fields)


def test_an_axis_that_the_image_lacks_is_refused() -> None:
    with pytest.raises(RequestError, match=r"flip_axes: found \[2\]; the image has 2 axes: valid 0 to 1"):
        augment(*window((4, 4)), Augmentation(flip_axes=[2]), np.random.default_rng(0))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    image, target = window((4, 5))
    with pytest.raises(ValueError, match=r"image \(1, 4, 5\), target \(4,\)"):
        augment(image, target[:, 0], ALWAYS, np.random.default_rng(0))
    with pytest.raises(ValueError, match="spacing"):
        augment(image, target, ALWAYS, np.random.default_rng(0), spacing=(1, 1, 1))


def test_the_spec_loads_no_torch() -> None:
    code = "import sys, segpipe.config.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

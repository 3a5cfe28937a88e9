"""How far every family looks, and what a halo does for it: `halo: auto`, measured.

``python -m benchmarks.reach [NAME …]`` prints, for each network of `benchmarks.networks`, its radius; where
that is finite, the greatest difference of a probability between tiles with that halo and the whole (law
2); for the others the share of elements whose class changes, by halo, in one place of noise with the spectrum
of natural images. Weights are random: these look as far as trained ones, but their errors are not
those of your model. The two networks on VGG-16 have an eighth of its channels here: how far they look is the
same, and the whole table takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import Family, families, family_card, literature
from benchmarks.rows import BANDS
from segpipe.config.card import load_card
from segpipe.geometry.box import Box
from segpipe.inference.receptive_field.probe import measure_radius
from segpipe.inference.receptive_field.reach import measure_reach, natural_noise
from segpipe.models.base import SegmentationModel
from segpipe.models.registry import load_model
from segpipe.tiling.windows import make_lattice

MOST = {2: 1400, 3: 120}
"""Longest edge of a whole that is compared with its tiles along all axes; beyond, along one."""
BUDGET = {2: 2**20, 3: 2**21}
"""Elements of the largest forward pass, or a window with one stride around it where that is more."""
NARROW = [literature("SegNet", 32, width=0.125), literature("DeepLabV1", 8, width=0.125)]
"""The same architectures with fewer channels."""


def main() -> None:
    """A line per network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    names = parser.parse_args().names
    narrow = {family.name: family for family in NARROW}
    for family in families():
        if not names or family.name in names:
            begun = time.perf_counter()
            found = line(narrow.get(family.name, family))
            print(f"{family.name:<40} {found} ({time.perf_counter() - begun:.0f} s)", flush=True)


def line(family: Family) -> str:
    """What was found of one family."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        card = load_card(family_card(family, family.make().eval(), Path(folder)))
        model = load_model(card, "cpu", torch.get_num_threads(), "fp32")
    channels = BANDS if family.ndim == 2 else 1
    window = (family.size,) * family.ndim
    budget = max(BUDGET[family.ndim], (family.size + 2 * family.stride) ** family.ndim)
    radius = measure_radius(model, channels, family.stride, window, fixed=family.fixed, budget=budget, seed=0)
    if radius.values is None:
        return _seams(model, family, channels, budget)
    halo = max(-(-r // family.stride) * family.stride for r in radius.values)
    return f"radius {max(radius.values)}; {_law(model, family, channels, halo)}"


def _seams(model: SegmentationModel, family: Family, channels: int, budget: int) -> str:
    """Class changes by halo, of a network without a finite radius."""
    window = (family.size,) * family.ndim
    widest = (3 * family.size + 2 * family.stride,) * family.ndim
    reach = measure_reach(
        model, channels, family.ndim, family.stride, window, activation="softmax", fixed=family.fixed,
        budget_elements=budget, sample=natural_noise(channels, widest, 0),
    )  # fmt: skip
    seams = ", ".join(f"{halo}: {share:.2%}" for halo, share, _ in reach.seams)
    return f"no finite radius (window {family.size}); class changes by halo {seams}"


@torch.inference_mode()
def _law(model: SegmentationModel, family: Family, channels: int, halo: int) -> str:
    """Tiles with this halo against the whole."""
    window = 2 * halo + 2 * family.stride
    edge = window + 2 * family.stride
    if edge <= MOST[family.ndim]:
        shape, windows, halos = ((n,) * family.ndim for n in (edge, window, halo))
        which = f"the whole of {edge}"
    else:  # along one axis, by a strip: its sides are the tiles' sides as well
        rest = family.ndim - 1
        shape, windows = ((n, *[4 * family.stride] * rest) for n in (edge, window))
        halos = (halo, *[0] * rest)
        which = f"the whole of {'x'.join(map(str, shape))}"
    image = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(0))
    whole = model(image).softmax(1)
    lattice = make_lattice(shape, windows, halos, family.stride)
    worst = 0.0
    for index in lattice.windows(Box.whole(shape), "trim"):
        seen, owned = lattice.window(index), lattice.owned(index)
        kept: tuple[Any, ...] = (..., *owned.within(seen))
        place: tuple[Any, ...] = (..., *owned.slices)
        crop: tuple[Any, ...] = (..., *seen.slices)
        worst = max(worst, float((model(image[crop]).softmax(1)[kept] - whole[place]).abs().max()))
    return f"tiles of {window} with a halo of {halo} equal {which} within {worst:.1e}"


if __name__ == "__main__":
    main()

"""How far every family looks, and what a halo does for it: `halo: auto`, measured.

``python -m benchmarks.reach [NAME …]`` prints, for each network of `benchmarks.networks`, its radius; where
that is finite, the greatest difference of a probability between tiles with that halo and the whole (law
2); for the others the share of elements whose class changes, by halo. Weights are random: these look
as far as trained ones, but their errors are not those of your model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.families import _card
from benchmarks.networks import BANDS, Family, families
from segpipe.boxes import Box
from segpipe.inference.reach import measure_reach
from segpipe.lattice import make_lattice
from segpipe.models.card import load_card
from segpipe.models.registry import load_model

MOST = {2: 1400, 3: 120}
"""Longest edge of a whole that is compared with its tiles."""


def main() -> None:
    """A line per network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    names = parser.parse_args().names
    for family in families():
        if not names or family.name in names:
            print(line(family), flush=True)


def line(family: Family) -> str:
    """What was found of one family."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        card = load_card(_card(family, family.make().eval(), Path(folder)))
        model = load_model(card, "cpu", torch.get_num_threads(), "fp32")
    channels = BANDS if family.ndim == 2 else 1
    window = (family.size,) * family.ndim
    reach = measure_reach(
        model, channels, family.ndim, family.stride, window, activation="softmax", fixed=family.fixed
    )
    if reach.radius is None:
        seams = ", ".join(f"{halo}: {share:.2%}" for halo, share, _ in reach.seams)
        return f"{family.name:<40} no finite radius (window {family.size}); class changes by halo {seams}"
    halo = [-(-r // family.stride) * family.stride for r in reach.radius]
    return f"{family.name:<40} radius {max(reach.radius)}; {_law(model, family, channels, max(halo))}"


@torch.inference_mode()
def _law(model: torch.nn.Module, family: Family, channels: int, halo: int) -> str:
    """Tiles with this halo against the whole."""
    window = 2 * halo + 2 * family.stride
    edge = window + 2 * family.stride
    if edge > MOST[family.ndim]:
        return f"not compared: a whole of {edge} is over {MOST[family.ndim]}"
    shape = (edge,) * family.ndim
    image = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(0))
    whole = model(image).softmax(1)
    lattice = make_lattice(shape, (window,) * family.ndim, (halo,) * family.ndim, family.stride)
    worst = 0.0
    for index in lattice.windows(Box.whole(shape), "trim"):
        seen, owned = lattice.window(index), lattice.owned(index)
        tile = model(image[(..., *seen.slices)]).softmax(1)[(..., *owned.within(seen))]
        worst = max(worst, float((tile - whole[(..., *owned.slices)]).abs().max()))
    return f"tiles of {window} with a halo of {halo} equal the whole of {edge} within {worst:.1e}"


if __name__ == "__main__":
    main()

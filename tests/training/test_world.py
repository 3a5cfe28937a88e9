"""Several processes, as torchrun starts them, are one process with a larger batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from segpipe.training.distributed import World
from segpipe.training.run import SILENT, train
from tests.training.conftest import RasterFolder, recipe_data, recipe_of, write_recipe

PROGRAM = """
import sys
from segpipe.config.recipe import load_recipe
from segpipe.training.run import SILENT, train
train(load_recipe(sys.argv[1]), SILENT)
"""


def test_one_process_is_a_world_of_its_own() -> None:
    world = World()
    assert world.first
    assert (world.any(True), world.any(False), world.mean(0.3)) == (True, False, 0.3)
    module = torch.nn.Linear(1, 1)
    assert world.wrap(module) is module
    world.wait()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(four_rasters: RasterFolder, tmp_path: Path) -> None:
    """No norm, and cross-entropy: the mean over all windows is the mean of both halves' means."""
    fields: dict[str, Any] = {
        "card": {"arguments": {"channels": [8, 16], "strides": [2], "num_res_units": 0, "norm": None}},
        "loss": [{"name": "cross_entropy"}],
        "split": {"fold": "none"},
        "optimise": {"accumulate": 2, "rate": 0.01, "steps": 4},
        "judge": {"every": 2},
    }
    data = recipe_data(four_rasters[0], out=str(tmp_path / "two"), **fields)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = ["--standalone", "--nproc-per-node=2", program, write_recipe(tmp_path / "two.yaml", data)]
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, check=True, timeout=600,
    )  # fmt: skip
    fields["optimise"]["batch"] = 4
    one = train(recipe_of(four_rasters[0], out=str(tmp_path / "one"), **fields), SILENT)
    assert one.card is not None
    (two,) = (tmp_path / "two").glob("tiny/*/all")
    wanted, found = (load_file(f / "weights.safetensors") for f in (one.card.parent, two))
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)
    losses = [
        [m["loss"] for m in torch.load(f / "checkpoint.pt", weights_only=True)["progress"]["history"]]
        for f in (one.card.parent, two)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert json.loads((two / "training.json").read_text())["steps"] == 4

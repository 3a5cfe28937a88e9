"""Training of a tiny network: stopping and going on, the file it writes, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from segpipe.config.card import load_card
from segpipe.errors import RequestError
from segpipe.prompts.segmenters.base import Prompt
from segpipe.prompts.segmenters.looknet import LOOKS, PromptTensors, drawn, laid, looks_at
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.training.prompted.recipe import PromptedRecipe, load_prompted_recipe
from segpipe.training.prompted.run import Line, PromptedTraining

ROOT = Path(__file__).parents[3]


def test_a_run_that_went_on_is_the_run_that_did_not_stop(fields: dict[str, Any], tmp_path: Path) -> None:
    fields["sampling"] |= {"objects": 1, "cycle": [{"part": 2}]}

    def trained(out: str, *steps: int) -> dict[str, torch.Tensor]:
        for n in steps:
            # Where training ends is no part of what came before, until the rate falls.
            plan = {**fields["optimise"], "steps": n, "cooldown": 0}
            path = tmp_path / "r.yaml"
            path.write_text(yaml.safe_dump({**fields, "out": str(tmp_path / out), "optimise": plan}))
            training = PromptedTraining(load_prompted_recipe(path))
            training.run(lambda line: None)
        state: dict[str, torch.Tensor] = training.average.module.state_dict()
        return state

    once, twice = trained("once", 2), trained("twice", 1, 2)
    assert all((once[name] == twice[name]).all() for name in once)


def test_the_file_is_a_segmenters(recipe: PromptedRecipe, tmp_path: Path) -> None:
    lines: list[Line] = []
    training = PromptedTraining(recipe)
    training.run(lines.append)
    assert [line.step for line in lines] == [2, 4] and all(np.isfinite(line.loss) for line in lines)
    fields = yaml.safe_load((ROOT / "configs" / "models" / "starter-sam.yaml").read_text())
    fields |= {
        "weights": "net.safetensors",
        "window": {"size": [128], "fixed": True},
        "arguments": dict(recipe.network),
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields))
    segmenter = load_segmenter(load_card(tmp_path / "card.yaml"), torch.device("cpu"))
    window = np.random.default_rng(0).normal(size=(3, 128, 128)).astype(np.float32)
    box = np.array([8, 8, 30, 40], np.float32)
    found = segmenter.decode(segmenter.encode(window), [Prompt(box_xyxy=box)])
    # The network before it was rounded to float16, asked without the segmenter.
    network = training.average.module.eval()
    batch = torch.from_numpy(window)[None]
    for look in range(LOOKS):
        asked = PromptTensors(torch.from_numpy(box)[None], torch.zeros(1, 1, 2), torch.full((1, 1), -1))
        edges = looks_at(asked, torch.tensor([look]))
        with torch.no_grad():
            logits, iou = network.decode(
                batch, network.encode(batch), torch.zeros(1), edges, drawn(asked, edges)
            )
        wanted = laid(logits, edges, (128, 128), -10.0)[0].numpy()
        np.testing.assert_allclose(found.logits[0, look], wanted, atol=0.05)
        np.testing.assert_allclose(found.iou[0, look], iou[0].numpy(), atol=0.01)


def test_a_network_learns_what_a_box_is(fields: dict[str, Any], tmp_path: Path) -> None:
    """Objects are blobs in the middle of a look: some steps are enough to beat an empty and a full mask."""
    fields["sampling"] |= {"cycle": [{"part": 2}], "objects": 4, "exact": 1, "again": 1000}
    fields["optimise"] |= {"steps": 40, "rate": 0.01, "every": 10}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    lines: list[Line] = []
    PromptedTraining(load_prompted_recipe(path)).run(lines.append)
    # Beyond a mask that is the whole box everywhere, whose IoU is the share of the box that objects cover.
    assert lines[-1].box > lines[0].box + 0.1 and lines[-1].loss < lines[0].loss


def test_a_loss_that_is_not_finite_ends_training(recipe: PromptedRecipe) -> None:
    training = PromptedTraining(recipe)
    with torch.no_grad():
        training.network.mask.weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="loss is not finite in step 1"):
        training.run(lambda line: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"rasters": []}}, "data.rasters"),
        ({"sampling": {"drawn": 0, "raster": 0, "volume": 0}}, "found no windows"),
        ({"optimise": {"step": 3}}, "did you mean `steps`"),
    ],
)
def test_mistakes_are_told(
    fields: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**fields, **change}))
    with pytest.raises(RequestError, match=message):
        load_prompted_recipe(path)


def test_rows_that_are_judged_are_not_learned_from(fields: dict[str, Any], tmp_path: Path) -> None:
    fields["data"]["rasters"][0]["judged"] = [70, 120]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RequestError, match=r"judged: found rows \[70, 120\]; valid: rows outside \[0, 76\]"):
        load_prompted_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "network: .*unexpected keyword argument 'depth'"),
        ({"width": 0}, "found in_channels 3, width 0, context 32; valid: 1 or more"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused(
    fields: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fields["network"] = change
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RequestError, match=message):
        PromptedTraining(load_prompted_recipe(path))

"""The script beside the weights of starter-sam: some steps give weights that a card takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml

from segpipe.config.card import load_card
from segpipe.prompts.segmenters.base import Prompt
from segpipe.prompts.segmenters.registry import load_segmenter
from tests.world import write_raster

MODELS = Path(__file__).parents[3] / "configs" / "models"
SCRIPT = MODELS / "starter-sam" / "train" / "train.py"


def write_data(root: Path) -> None:
    """Discs as a raster of four bands, and balls of two halves in two volumes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :100]
    labels = np.zeros((120, 100), np.uint8)
    for cy, cx, radius, value in ((20, 20, 9, 1), (20, 70, 7, 2), (60, 50, 12, 1), (95, 30, 8, 2)):
        labels[np.hypot(y - cy, x - cx) < radius] = value
    write_raster(root / "image.tif", (rng.normal(100, 5, (4, 120, 100)) + 60 * labels).astype(np.float32))
    write_raster(root / "labels.tif", labels[None])
    for name in ("case_1", "case_2"):
        z, y, x = np.mgrid[:20, :24, :22]
        ball = (np.sqrt((z - 10) ** 2 + (y - 12) ** 2 + (x - 11) ** 2) < 6).astype(np.int16)
        ball[ball > 0] += (y > 12)[ball > 0]
        values = (rng.normal(50, 3, ball.shape) + 30 * ball).astype(np.float32)
        for folder, array in (("images", values), ("labels", ball)):
            (root / folder).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / folder / f"{name}.nii.gz")


def write_recipe(path: Path) -> None:
    """The recipe of the weights with a small network and these files."""
    recipe = yaml.safe_load(SCRIPT.with_name("recipe.yaml").read_text())
    recipe["network"] = {"width": 4, "context": 8}
    raster = {"image": "image.tif", "labels": "labels.tif", "bands": [*"abcd"], "values": [1, 2]}
    recipe["data"]["rasters"] = [
        {"name": "discs", "labels_shift": [0, 0], "learned": [0, 110], "judged": None, **raster}
    ]
    volumes = {"images": "images/*.nii.gz", "labels": "labels", "groups": [[1], [2], [1, 2]]}
    recipe["data"]["volumes"] = [{"name": "balls", "judged": ["case_2"], **volumes}]
    recipe["sampling"]["cycle"] = [{"part": 2, "times": 1}]
    recipe["optimise"] |= {"warmup": 1, "cooldown": 2, "threads": 1}
    path.write_text(yaml.safe_dump(recipe))


@pytest.mark.slow
def test_the_script_writes_weights_for_the_card(tmp_path: Path) -> None:
    write_data(tmp_path)
    write_recipe(tmp_path / "recipe.yaml")
    out = tmp_path / "net.safetensors"
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--recipe", tmp_path / "recipe.yaml", "--data", tmp_path),
            *("--steps", "4", "--out", out),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("step 4: loss "), done.stderr
    card = yaml.safe_load((MODELS / "starter-sam.yaml").read_text())
    card |= {"weights": out.name, "arguments": {"width": 4, "context": 8}}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    segmenter = load_segmenter(load_card(tmp_path / "card.yaml"), torch.device("cpu"))
    window = np.random.default_rng(0).normal(size=(3, 256, 256)).astype(np.float32)
    found = segmenter.decode(
        segmenter.encode(window), [Prompt(box_xyxy=np.array([8, 8, 30, 40], np.float32))]
    )
    assert np.isfinite(found.logits).all() and np.isfinite(found.iou).all()

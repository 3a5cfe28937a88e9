"""Train the weights of starter-sam, on drawn shapes and the labelled scenes of recipe.yaml.

``python configs/models/starter-sam/train/train.py [--data FOLDER] [--out FILE]`` takes an hour on two cores.
The weights in the repository were made by `segpipe.training.prompted` of commit 7b0aeb9 from the same recipe;
this is the same loop without its checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from scenes import Scenes, raster_window, read_scenes, volume_window
from shapes import Drawn, draw_scene
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segpipe.inference.queues import Prefetch
from segpipe.prompts.segmenters.looknet import LookNet
from segpipe.training.promptable import (
    Looks,
    ObjectPrompts,
    mask_loss,
    sample_corrections,
    sample_looks,
    sample_prompts,
)

RECIPE = Path(__file__).parent / "recipe.yaml"
OUT = Path(__file__).parents[2] / "starter-sam.safetensors"
CENTRE, SPREAD = 0.5, 0.25
"""Images 0 to 1 become (x − centre) / spread: the card's last two steps."""


def load_recipe(path: Path, data: str | None = None) -> Any:
    """Return the recipe, its keys as attributes; ``data`` overrides the folder of the scenes."""
    text = json.dumps(yaml.safe_load(path.read_text()))
    recipe = json.loads(text, object_hook=lambda mapping: SimpleNamespace(**mapping))
    recipe.data.root = data or recipe.data.root
    return recipe


def batches(recipe: Any, scenes: Scenes) -> Iterator[tuple[np.ndarray, ObjectPrompts]]:
    """Yield windows (b, 3, y, x) and prompts; a batch depends on the seed and its number alone."""
    sampling = recipe.sampling
    for number in range(recipe.optimise.steps):
        rng = np.random.default_rng((recipe.optimise.seed, number))
        crops = sampling.cycle[number % len(sampling.cycle)]
        edge = sampling.window // crops.part
        windows = [draw_scene(rng, scenes.textures, edge) for _ in range(crops.times * sampling.drawn)]
        for _ in range(crops.times * sampling.raster):
            windows.append(raster_window(rng, scenes.rasters[int(rng.integers(len(scenes.rasters)))], edge))
        windows += [volume_window(rng, scenes.volumes, edge) for _ in range(crops.times * sampling.volume)]
        found = [(i, mask) for i, w in enumerate(windows) for mask in objects(rng, w, sampling)]
        of, masks = zip(*found or [(0, np.ones((edge, edge), bool))], strict=True)
        prompts = sample_prompts(rng, masks, of, sampling.jitter, sampling.exact)
        yield np.stack([window.image for window in windows]), prompts


def objects(rng: np.random.Generator, window: Drawn, sampling: Any) -> list[np.ndarray]:
    """Return the masks (y, x) of some objects of a window that are large enough."""
    masks = (np.isin(window.ids, window.groups[i]) for i in rng.permutation(len(window.groups)))
    return [mask for mask in masks if mask.sum() >= sampling.smallest][: sampling.objects]


def learning_rate(plan: Any, step: int) -> float:
    """Return the rate of a step: it rises, stays, and falls linearly over the last steps."""
    rising, falling = (step + 1) / max(plan.warmup, 1), (plan.steps - step) / plan.cooldown
    return float(plan.rate * min(rising, falling, 1.0))


def loss_of(
    network: LookNet, images: np.ndarray, prompts: ObjectPrompts, recipe: Any, step: int
) -> torch.Tensor:
    """Return the loss of one look at each object; in some steps also of a corrected one."""
    rng = np.random.default_rng((recipe.optimise.seed, step, 1))
    x = torch.from_numpy((images - CENTRE) / SPREAD).contiguous(memory_format=torch.channels_last)
    half = torch.autocast("cpu", torch.bfloat16, enabled=recipe.optimise.bf16)
    with half:
        context = network.encode(x)

    def answer(looks: Looks) -> tuple[torch.Tensor, torch.Tensor]:
        with half:
            logits, predicted = network.decode(x, context, looks.windows, looks.edges, looks.maps)
        return logits.detach(), mask_loss(logits, predicted, looks.cover, looks.total)[0]

    looks = sample_looks(prompts, rng)
    logits, loss = answer(looks)
    if step % recipe.sampling.again == 0:
        loss = loss + answer(sample_corrections(looks, logits, rng))[1]
    return loss


def train(recipe: Any) -> torch.nn.Module:
    """Return the moving average of the network's weights after the recipe's steps."""
    plan = recipe.optimise
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    network = LookNet(**vars(recipe.network)).to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(plan.ema), use_buffers=True)
    learned = list(network.parameters())
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": plan.decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, fused=True)
    begun = time.monotonic()
    with Prefetch(batches(recipe, read_scenes(recipe)), 3) as ahead:
        for step, (images, prompts) in enumerate(ahead):
            torch.manual_seed(plan.seed * 1_000_003 + step)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(plan, step)
            network.train()
            loss = loss_of(network, images, prompts, recipe, step)
            loss.backward()
            # A gradient that is not finite would spoil every weight in silence.
            torch.nn.utils.clip_grad_norm_(learned, plan.clip, error_if_nonfinite=True)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if (step + 1) * (1 - plan.ema) < 1:
                # Early on an average of few steps would still be mostly the random start.
                average.n_averaged.zero_()
            average.update_parameters(network)
            if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
                minutes = (time.monotonic() - begun) / 60
                print(f"step {step + 1}: loss {float(loss.detach()):.3f}, {minutes:.1f} min", flush=True)
    return average.module


def save(network: torch.nn.Module, path: Path) -> None:
    """Write the weights as float16, without the counters of steps."""
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({k: v.half().contiguous() for k, v in state.items()}, path)


def main() -> None:
    """Train, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--data", help="folder of the scenes; left out: the recipe's")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the weights")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.data)
    recipe.optimise.steps = given.steps or recipe.optimise.steps
    save(train(recipe), given.out)
    print(given.out)


if __name__ == "__main__":
    main()

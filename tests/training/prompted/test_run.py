"""Training of a tiny network: the library's own forward pass, stopping and going on, the folder it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import EdgeTamModel

from segpipe.errors import RequestError
from segpipe.models.card import load_card
from segpipe.prompts.prior import prior_logits
from segpipe.prompts.segmenters import Prompt, load_segmenter
from segpipe.training.prompted import network as nets
from segpipe.training.prompted.recipe import PromptedRecipe, load_prompted_recipe
from segpipe.training.prompted.run import Line, PromptedTraining

ROOT = Path(__file__).parents[3]


@pytest.fixture
def net(recipe: PromptedRecipe) -> Any:
    return nets.build(recipe.network, 0).eval()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_encode_and_decode_are_the_librarys_forward(net: Any, windows: torch.Tensor) -> None:
    boxes = torch.tensor([[3.0, 5, 20, 30], [10, 10, 40, 41]])
    points, labels = torch.tensor([[[12.0, 9]], [[30, 30]]]), torch.tensor([[1], [0]])
    given = torch.randn(2, 64, 64)
    with torch.no_grad():
        levels = nets.encode(net, windows)
        asked = nets.Asked(torch.arange(2), boxes, points, labels, given)
        masks, iou = nets.decode(net, levels, asked)
        wanted = net(
            pixel_values=windows,
            input_boxes=boxes[:, None],
            input_points=points[:, None],
            input_labels=labels[:, None],
            input_masks=given[:, None],
        )
        for a, b in zip(levels, net.get_image_embeddings(windows), strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(masks, wanted.pred_masks[:, 0] + given[:, None])  # what was given is the prior
    torch.testing.assert_close(iou, wanted.iou_scores[:, 0])


def test_attention_begins_with_the_sides_of_a_box(net: Any, windows: torch.Tensor) -> None:
    """Each head of the first layer: an element on the box's side of its edge attends to the corner."""
    seen: list[dict[str, torch.Tensor]] = []
    attention = net.mask_decoder.transformer.layers[0].cross_attn_image_to_token
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    box = torch.tensor([[39.5, 23.5, 87.5, 103.5]])
    with torch.no_grad():
        net.prompt_encoder.no_mask_embed.weight.zero_()
        blank = [torch.zeros_like(level) for level in nets.encode(net, windows[:1])]  # places alone
        nets.decode(net, blank, nets.Asked(torch.zeros(1, dtype=torch.long), box))
        q = attention.q_proj(seen[0]["query"]).view(16, 16, 4, 12)
        k = attention.k_proj(seen[0]["key"]).view(-1, 4, 12)
    hook.remove()
    logits = torch.einsum("yxhc,thc->hytx", q, k).movedim(2, -1)
    y, x = torch.meshgrid(*[torch.arange(16) * 8 + 3.5] * 2, indexing="ij")
    sides = torch.stack([x > 39.5, y > 23.5, x < 87.5, y < 103.5])
    for head, side in enumerate(sides):
        corner = 6 + head // 2  # after the object's, the IoU's and four masks' tokens
        agrees = (logits[head].argmax(-1) == torch.where(side, corner, 0)).float().mean()
        assert agrees > 0.8, head  # its edge is soft; chance is at most 0.7


def test_a_crop_lies_where_it_was_cut(net: Any, windows: torch.Tensor) -> None:
    """The decoder gets the codes of the crop's cells and of its prompts at their places in the window."""
    seen: list[dict[str, torch.Tensor]] = []
    hook = net.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        levels = nets.encode(net, windows[:, :, :32, :32])
        nets.decode(net, levels, nets.Asked(torch.arange(2), torch.full((2, 4), 4.0)), (16, 24))
        whole, _ = net.prompt_encoder(None, None, torch.tensor([[[28.0, 20, 28, 20]]] * 2), None)
    hook.remove()
    torch.testing.assert_close(seen[0]["sparse_prompt_embeddings"], whole)
    place = net.get_image_wide_positional_embeddings()[0, :, 2:6, 3:7]
    torch.testing.assert_close(seen[0]["image_positional_embeddings"][1], place)


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


def test_the_folder_is_a_segmenters(recipe: PromptedRecipe, tmp_path: Path, windows: torch.Tensor) -> None:
    lines: list[Line] = []
    training = PromptedTraining(recipe)
    training.run(lines.append)
    assert [line.step for line in lines] == [2, 4] and all(np.isfinite(line.loss) for line in lines)
    assert {p.name for p in (tmp_path / "net").iterdir()} == {"config.json", "model.safetensors"}
    fields = yaml.safe_load((ROOT / "configs" / "models" / "starter-sam.yaml").read_text())
    fields |= {"weights": "net", "window": {"size": [128], "fixed": True}}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields))
    segmenter = load_segmenter(load_card(tmp_path / "card.yaml"), torch.device("cpu"))
    box = np.array([8, 8, 30, 40], np.float32)
    found = segmenter.decode(segmenter.encode(windows[0].numpy()), [Prompt(box_xyxy=box)])
    prior = prior_logits(box, np.empty((0, 2)), np.empty(0), 2.0, segmenter.mask_shape)
    # The library's own model from the same folder, and the network before it was rounded to float16.
    for model, tolerance in (
        (EdgeTamModel.from_pretrained(tmp_path / "net"), 1e-5),
        (training.average.module, 0.05),
    ):
        with torch.no_grad():
            wanted = model.eval().float()(
                pixel_values=windows[:1],
                input_boxes=torch.from_numpy(box)[None, None],
                input_masks=torch.from_numpy(prior)[None, None],
            )
        np.testing.assert_allclose(found.low[0], wanted.pred_masks[0, 0].numpy() + prior, atol=tolerance)
        np.testing.assert_allclose(found.iou[0], wanted.iou_scores[0, 0].numpy(), atol=tolerance)


def test_a_loss_that_is_not_finite_ends_training(recipe: PromptedRecipe) -> None:
    training = PromptedTraining(recipe)
    with torch.no_grad():
        training.network.mask_decoder.iou_token.weight.fill_(float("nan"))
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
        ({"hidden_size": "many"}, "network: "),
        ({"hidden_size": 96, "num_attention_heads": 3}, "found 3 heads of 16 channels; valid: 4 heads of 11"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused(
    fields: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fields["network"] = {**fields["network"], "mask_decoder_config": change}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RequestError, match=message):
        PromptedTraining(load_prompted_recipe(path))

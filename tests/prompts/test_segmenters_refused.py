"""Prompts, cards and folders that a segmenter refuses, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segpipe.errors import RequestError
from segpipe.prompts.segmenters.base import Embedding, Prompt
from segpipe.prompts.segmenters.registry import check_segmenter, load_segmenter
from tests.prompts.tiny_sams import card_for, points, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def sam_folder(tmp_path: Path) -> Path:
    tiny("sam").save_pretrained(tmp_path / "net")
    return tmp_path


def test_wrong_prompts_are_told_by_number(sam_folder: Path) -> None:
    segmenter = load_segmenter(card_for(sam_folder), CPU)
    embedding = segmenter.encode(np.zeros((3, 64, 64), np.float32))
    good = Prompt(**points((30, 20), labels=(1,)))
    for prompt, told in [
        (Prompt(), "prompt 1: points_xy: found none; valid: a point, a box or a mask"),
        (
            Prompt(**points((70, 3), labels=(1,))),
            r"prompt 1: points_xy: found \[\[70.0, 3.0\]\]; valid: x, y",
        ),
        (Prompt(**points((np.nan, 3), labels=(1,))), "prompt 1: points_xy: found"),
        (Prompt(**points((3, 3), labels=(2,))), r"prompt 1: labels: found \[2\]; valid: 1 times 0 or 1"),
        (Prompt(box_xyxy=np.array([9, 9, 3, 12.0])), "prompt 1: box_xyxy: found"),
        (Prompt(mask=np.zeros((64, 64))), r"prompt 1: mask: found shape \(64, 64\); valid: \(16, 16\)"),
    ]:
        with pytest.raises(RequestError, match=told):
            segmenter.decode(embedding, [good, prompt])
    with pytest.raises(RequestError, match=r"window: found shape \(1, 64, 64\); valid: \(3, 64, 64\)"):
        segmenter.encode(np.zeros((1, 64, 64), np.float32))
    with pytest.raises(RequestError, match=r"embedding: found .*; valid: .*image"):
        segmenter.decode(Embedding({"other": np.zeros((1, 2, 2))}), [good])
    with pytest.raises(RequestError, match="embedding 'image': found 70000; valid in float16: up to 65504"):
        Embedding({"image": np.full((1, 2, 2), 7e4, np.float32)}).half()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"provider": "smp"}, "provider: found smp; valid for prompts: transformers"),
        ({"architecture": "Sam2Model"}, "architecture: found Sam2Model; .* 'sam': valid: SamModel"),
        ({"window": {"size": [64]}}, r"window.size: found \[64\], fixed false; .* valid: size: \[64\]"),
        ({"window": {"size": [128], "fixed": True}}, "window.size: found .* image_size 64"),
        ({"input": {"bands": ["a", "b"]}}, "input.bands: found 2; .* num_channels 3: valid: as many, or one"),
        ({"arguments": {"enlarge": "masks"}}, "arguments.enlarge: found 'masks'; valid: logits, probab"),
        ({"arguments": {"points": 3}}, "arguments.points: unknown; valid: enlarge"),
    ],
)
def test_cards_that_do_not_fit_are_refused(sam_folder: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        check_segmenter(card_for(sam_folder, **fields))


def rewritten(folder: Path, **keys: Any) -> None:
    path = folder / "net" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_volumes_are_cut_in_any_direction(sam_folder: Path) -> None:
    for size in ([1, 64, 64], [64, 64, 1]):
        check_segmenter(card_for(sam_folder, kind="volume", input={}, window={"size": size, "fixed": True}))
    with pytest.raises(
        RequestError, match=r"window.size: found \[64\], fixed true; .* valid: size: \[1, 64, 64\]"
    ):
        check_segmenter(card_for(sam_folder, kind="volume", input={}, window={"size": [64], "fixed": True}))


def test_config_json_is_numbers_alone(sam_folder: Path) -> None:
    card = card_for(sam_folder)
    image = np.random.default_rng(1).normal(size=(3, 64, 64)).astype(np.float32)
    before = load_segmenter(card, CPU).encode(image)
    rewritten(sam_folder, auto_map={"AutoModel": "evil.Net"}, attn_implementation="someone/kernel")
    after = load_segmenter(card, CPU).encode(image)
    assert np.array_equal(before.arrays["image"], after.arrays["image"])
    vision = json.loads((sam_folder / "net" / "config.json").read_text())["vision_config"]
    for keys, told in [
        ({"vision_config": {**vision, "image_size": 128}}, r"found an encoder of sizes \[128, 16\]; valid"),
        (
            {"prompt_encoder_config": {"image_size": 60, "patch_size": 16}},
            "found image_size 60, patch_size 16",
        ),
        ({"model_type": "bert"}, "model_type is 'bert'; valid for prompts: sam, sam_hq, sam2"),
    ]:
        rewritten(sam_folder, **keys)
        with pytest.raises(RequestError, match=told):
            check_segmenter(card)


def test_backbones_of_timm_are_names_alone(tmp_path: Path) -> None:
    tiny("edgetam").config.save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").touch()
    card = card_for(tmp_path, "edgetam")
    check_segmenter(card)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    vision = config["vision_config"]
    for change, told in [
        (
            {"architecture": "hf-hub:someone/net"},
            "architecture: found 'hf-hub:someone/net'; valid: a name of timm",
        ),
        ({"model_args": {"checkpoint_path": "/x"}}, "model_args: found 'checkpoint_path'; valid: in_chans"),
    ]:
        backbone = {**vision["backbone_config"], **change}
        rewritten(tmp_path, vision_config={**vision, "backbone_config": backbone})
        with pytest.raises(RequestError, match=told):
            check_segmenter(card)


def test_damaged_weights_are_refused(sam_folder: Path) -> None:
    card, path = card_for(sam_folder), sam_folder / "net" / "model.safetensors"
    network = tiny("sam")
    with torch.no_grad():
        network.mask_decoder.iou_token.weight[0, 0] = torch.nan
    network.save_pretrained(sam_folder / "net")
    with pytest.raises(RequestError, match=r"weights: mask_decoder.iou_token.weight in .* holds NaN"):
        load_segmenter(card, CPU)
    state = {
        k: v.clone() for k, v in tiny("sam").state_dict().items() if k != "mask_decoder.iou_token.weight"
    }
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"missing keys: mask_decoder.iou_token.weight"):
        load_segmenter(card, CPU)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_segmenter(card, CPU)

"""Tiny networks of every promptable family, random weights; the library's own processors; cards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
import yaml

from segpipe.config.card import load_card
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.prompts.segmenters.base import Embedding, Prompt, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.sources.base import Pixels, Scaling

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
VIT = {
    "hidden_size": 16,
    "output_channels": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "num_pos_feats": 16,
    "mlp_dim": 32,
}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 2, 2, 2],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}
REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 1000,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}
SAM3_VIT = {
    "model_type": "sam3_vit_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "window_size": 2,
    "global_attn_indexes": [1],
    "pretrain_image_size": 28,
}
PYRAMID = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32}
MEMORY = {
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 16,
    "memory_attention_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 16,
    "memory_fuser_num_layers": 1,
}
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16, "num_layers": 1}


def prompts_of(edge: int, patch: int) -> dict[str, int]:
    return {"hidden_size": 32, "image_size": edge, "patch_size": patch, "mask_input_channels": 8}


def sam2_vision() -> dict[str, Any]:
    channels = [64, 32, 16, 8]
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": HIERA,
        "backbone_channel_list": channels,
        **PYRAMID,
    }


def sam3_parts() -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "sam3_vision_model", "backbone_config": SAM3_VIT, **PYRAMID},
        "prompt_encoder_config": prompts_of(56, 14),
        "mask_decoder_config": DECODER,
    }


def sam() -> Any:
    return t.SamModel(
        t.SamConfig(vision_config=VIT, prompt_encoder_config=prompts_of(64, 16), mask_decoder_config=DECODER)
    )


def sam_hq() -> Any:
    decoder = {**DECODER, "vit_dim": 16}
    return t.SamHQModel(
        t.SamHQConfig(
            vision_config=VIT, prompt_encoder_config=prompts_of(64, 16), mask_decoder_config=decoder
        )
    )


def sam2() -> Any:
    return t.Sam2Model(
        t.Sam2Config(
            vision_config=sam2_vision(),
            prompt_encoder_config=prompts_of(64, 16),
            mask_decoder_config=DECODER,
        )
    )


def sam2_video(**more: Any) -> Any:
    return t.Sam2VideoModel(
        t.Sam2VideoConfig(
            vision_config=sam2_vision(),
            prompt_encoder_config=prompts_of(64, 16),
            mask_decoder_config=DECODER,
            image_size=64,
            **MEMORY,
            **more,
        )
    )


def edgetam_parts() -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "edgetam_vision_model", "backbone_config": REPVIT, **PYRAMID},
        "prompt_encoder_config": prompts_of(64, 16),
        "mask_decoder_config": DECODER,
    }


def edgetam() -> Any:
    return t.EdgeTamModel(t.EdgeTamConfig(**edgetam_parts()))


def edgetam_video() -> Any:
    memory = {key: n for key, n in MEMORY.items() if key != "memory_attention_feed_forward_hidden_size"}
    return t.EdgeTamVideoModel(
        t.EdgeTamVideoConfig(**edgetam_parts(), **memory, image_size=64, memory_attention_mlp_hidden_size=16)
    )


def sam3_tracker() -> Any:
    return t.Sam3TrackerModel(t.Sam3TrackerConfig(**sam3_parts()))


def sam3_tracker_video() -> Any:
    return t.Sam3TrackerVideoModel(t.Sam3TrackerVideoConfig(**sam3_parts(), **MEMORY, image_size=56))


def sam3_video() -> Any:
    text = {
        "model_type": "clip_text_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    detector = {
        "model_type": "sam3",
        "vision_config": sam3_parts()["vision_config"],
        "text_config": text,
        "geometry_encoder_config": SMALL,
        "detr_encoder_config": SMALL,
        "detr_decoder_config": {**SMALL, "num_queries": 5},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }
    tracker = {"model_type": "sam3_tracker_video", "image_size": 56, **sam3_parts(), **MEMORY}
    return t.Sam3VideoModel(
        t.Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=16)
    )


NETWORKS = {
    "sam": sam,
    "sam_hq": sam_hq,
    "sam2": sam2,
    "edgetam": edgetam,
    "sam3_tracker": sam3_tracker,
}
VIDEO_NETWORKS = {
    "sam2_video": (sam2_video, t.Sam2Model),
    "edgetam_video": (edgetam_video, t.EdgeTamModel),
    "sam3_tracker_video": (sam3_tracker_video, t.Sam3TrackerModel),
    "sam3_video": (sam3_video, t.Sam3TrackerModel),
}
"""And the class for images that reads the same folder."""


def tiny(family: str) -> Any:
    """The library's network of a family; see `weighted`."""
    return weighted(NETWORKS[family])


def weighted(build: Callable[[], Any]) -> Any:
    """The network in evaluation mode, with weights whose masks have an inside and an outside."""
    torch.manual_seed(7)
    network = build()
    for name, parameter in network.named_parameters():
        if "backbone.timm_model" in name:
            continue
        if parameter.ndim > 1 and "positional_embedding" not in name:
            torch.nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter[0].numel()))
        if "point_embed" in name or "mask_tokens" in name or "not_a_point" in name:
            torch.nn.init.normal_(parameter)
    return network.eval()


def processor(family: str) -> Any:
    """As published, but of the tiny window."""
    edge = edge_of(family)
    square = {"height": edge, "width": edge}
    low = {"height": edge // 4, "width": edge // 4}
    if family.startswith(("sam2", "edgetam", "sam3")):
        images = t.Sam2ImageProcessor(size=square, mask_size=low, image_mean=MEAN, image_std=STD)
        return t.Sam3TrackerProcessor(images) if family.startswith("sam3") else t.Sam2Processor(images)
    images = t.SamImageProcessor(
        size={"longest_edge": edge},
        pad_size=square,
        mask_size={"longest_edge": edge // 4},
        mask_pad_size=low,
        image_mean=MEAN,
        image_std=STD,
    )
    return t.SamHQProcessor(images) if family == "sam_hq" else t.SamProcessor(images)


def edge_of(family: str) -> int:
    return 56 if family.startswith("sam3") else 64


def picture(edge: int) -> np.ndarray:
    """Rings and stripes, (y, x, 3) uint8."""
    y, x = np.mgrid[:edge, :edge].astype(np.float64)
    radius = np.hypot(y - 0.4 * edge, x - 0.6 * edge)
    noise = np.random.default_rng(3).normal(0, 12, (edge, edge, 3))
    bands = np.stack([120 + 100 * np.sin(radius / 5), 4 * x % 255, 90 + 2 * y], axis=-1)
    return np.asarray(np.clip(bands + noise, 0, 255).astype(np.uint8))


def card_for(folder: Path, family: str = "sam", **fields: Any) -> Any:
    """A card on disk whose weights lie in ``folder / net``; ``fields`` replace its own."""
    edge = edge_of(family)
    data: dict[str, Any] = {
        "name": "trial",
        "kind": "raster",
        "provider": "transformers",
        "weights": "net",
        "input": {
            "bands": ["red", "green", "blue"],
            "normalisation": [
                {"op": "divide", "value": [255.0]},
                {"op": "subtract", "value": MEAN},
                {"op": "divide", "value": STD},
            ],
        },
        "window": {"size": [edge], "fixed": True},
        "output": {"kind": "prompted"},
    }
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({**data, **fields}))
    return load_card(path)


def points(*xy: tuple[float, float], labels: tuple[int, ...]) -> dict[str, Any]:
    """Fields of a prompt: x, y of each point, and whether it is of the object."""
    return {"points_xy": np.array(xy, np.float32), "labels": np.array(labels)}


class Published:
    """The library's processor and model, asked for one prompt."""

    def __init__(self, family: str, network: Any) -> None:
        self.network, self.processor = network, processor(family)
        self.image = picture(edge_of(family))

    def __call__(
        self, prompt: Prompt, masks: torch.Tensor | None = None, multimask: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (k, y, x) at the image's size, predicted IoU (k), logits as the model gave them."""
        given: dict[str, Any] = {}
        if len(prompt.points_xy):
            given["input_points"] = [[prompt.points_xy.tolist()]]
            given["input_labels"] = [[prompt.labels.tolist()]]
        if prompt.box_xyxy is not None:
            given["input_boxes"] = [[prompt.box_xyxy.tolist()]]
        inputs = self.processor(images=self.image, return_tensors="pt", **given)
        sizes = [inputs.pop("original_sizes")]
        if "reshaped_input_sizes" in inputs:
            sizes.append(inputs.pop("reshaped_input_sizes"))
        with torch.inference_mode():
            out = self.network(**inputs, input_masks=masks, multimask_output=multimask)
        [large] = self.processor.post_process_masks(out.pred_masks, *sizes, binarize=False)
        return large[0], out.iou_scores[0, 0], out.pred_masks[0, 0]


def normalised(card: Any, image: np.ndarray) -> np.ndarray:
    """The window as the engine would hand it over."""
    steps = Normaliser(card, (Scaling(),) * 3, Statistics())
    channels = np.moveaxis(image, -1, 0)
    return steps.elementwise(Pixels(channels, np.ones(image.shape[:2], bool)))


def published_medsam(network: Any, scan: np.ndarray, box_xyxy: np.ndarray) -> torch.Tensor:
    """Probabilities (y, x) of the object in a box, as MedSAM_Inference.py of MedSAM's repository has them."""
    stretched = (scan - scan.min()) / np.clip(scan.max() - scan.min(), 1e-8, None)
    image = torch.from_numpy(np.repeat(stretched[None, None], 3, axis=1))
    with torch.no_grad():
        embedding = network.vision_encoder(image).last_hidden_state
        sparse, dense = network.prompt_encoder(
            input_points=None,
            input_labels=None,
            input_boxes=torch.from_numpy(box_xyxy)[None, None],
            input_masks=None,
        )
        low, _ = network.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=network.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    large = torch.nn.functional.interpolate(
        low[:, 0].sigmoid(), size=scan.shape, mode="bilinear", align_corners=False
    )
    return large[0, 0]


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of masks (…, y, x), 1 where both are empty."""
    union = (a | b).sum((-2, -1))
    return np.where(union > 0, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


@dataclass(frozen=True)
class World:
    """One family: the library's model, and ours from the folder that it was saved in."""

    family: str
    card: Any
    published: Published
    segmenter: Segmenter
    window: np.ndarray
    embedding: Embedding


def make_world(family: str, folder: Path, network: Any = None) -> World:
    """With the picture as the only window; the tiny network where none is given."""
    network = network or tiny(family)
    network.save_pretrained(folder / "net")
    published, card = Published(family, network), card_for(folder, family)
    segmenter = load_segmenter(card, torch.device("cpu"))
    window = normalised(card, published.image)
    return World(family, card, published, segmenter, window, segmenter.encode(window))

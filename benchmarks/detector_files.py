"""Detectors of every family of the transformers library, tiny and with random weights, as folders on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as library


def bert(folder: Path) -> Any:
    """Its tokenizer, of few words."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "lake",
        "dock",
        "field",
        "small",
        "##s",
        "?",
        ",",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    return library.BertTokenizer(str(folder / "vocab.txt"))


def clip_words(folder: Path, length: int) -> Any:
    """CLIP's tokenizer, of letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    entries = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(["!", *entries])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return library.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length, pad_token="!"
    )


def dino(folder: Path, prefix: str) -> Any:
    """Grounding DINO (prefix GroundingDino) or MM-Grounding-DINO (MMGroundingDino)."""
    config = getattr(library, f"{prefix}Config")(
        backbone_config=library.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
            image_size=64,
        ),
        text_config=library.BertConfig(
            vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=40,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=24,
    )
    image = library.GroundingDinoImageProcessor(size={"shortest_edge": 80, "longest_edge": 140})
    network = getattr(library, f"{prefix}ForObjectDetection")(config)
    return network, library.GroundingDinoProcessor(image, bert(folder))


def owl(folder: Path) -> Any:
    """OWLv2."""
    words = clip_words(folder, 16)
    config = library.Owlv2Config(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    image = library.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return library.Owlv2ForObjectDetection(config), library.Owlv2Processor(image, words)


def clipseg(folder: Path) -> Any:
    """CLIPSeg."""
    words = clip_words(folder, 20)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = library.CLIPSegConfig(
        text_config=dict(
            **sizes,
            vocab_size=len(words),
            max_position_embeddings=20,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        ),
        vision_config=dict(**sizes, image_size=32, patch_size=8),
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    image = library.ViTImageProcessor(size={"height": 32, "width": 32})
    return library.CLIPSegForImageSegmentation(config), library.CLIPSegProcessor(image, words)


def sam3(folder: Path) -> Any:
    """SAM 3, alone."""
    words = clip_words(folder, 32)
    return library.Sam3Model(library.Sam3Config(**sam3_parts(words))), sam3_processor(words)


def sam3_video(folder: Path) -> Any:
    """SAM 3 in the video model, as it is published."""
    words = clip_words(folder, 32)
    pyramid = {"backbone_feature_sizes": SIZES, "fpn_hidden_size": 32}
    tracker = {
        "model_type": "sam3_tracker_video",
        "image_size": 56,
        "vision_config": {"model_type": "sam3_vision_model", "backbone_config": VIT, **pyramid},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 56, "patch_size": 14},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2},
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
    detector = {"model_type": "sam3", **sam3_parts(words)}
    config = library.Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=16)
    return library.Sam3VideoModel(config), sam3_processor(words)


VIT = {
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
SIZES = [[16, 16], [8, 8], [4, 4]]


def sam3_parts(words: Any) -> dict[str, Any]:
    """Of its configuration."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16, "num_layers": 1}
    return {
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_config": VIT,
            "backbone_feature_sizes": SIZES,
            "fpn_hidden_size": 32,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 16,
            "projection_dim": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        "geometry_encoder_config": small,
        "detr_encoder_config": small,
        "detr_decoder_config": {**small, "num_queries": 12},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }


def sam3_processor(words: Any) -> Any:
    """The library's, for 56² elements."""
    return library.Sam3Processor(library.Sam3ImageProcessor(size={"height": 56, "width": 56}), words)


def clip(folder: Path) -> Any:
    """CLIP."""
    words = clip_words(folder, 40)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = library.CLIPConfig(
        text_config=dict(
            **sizes,
            vocab_size=len(words),
            max_position_embeddings=40,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        ),
        vision_config=dict(**sizes, image_size=32, patch_size=8),
        projection_dim=16,
    )
    image = library.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return library.CLIPModel(config), library.CLIPProcessor(image, words)


def save(
    folder: Path, make: Callable[..., Any], *arguments: str, factor: float = 3, seed: int = 1
) -> tuple[Any, Any]:
    """The library's network and processor, which are then in the folder, too.

    Args:
        make: `dino`, `owl`, `clipseg`, `sam3`, `sam3_video` or `clip`.
        arguments: of it.
        factor: of matrices: networks begin with logits near 0; larger numbers tell queries and words apart.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    folder.mkdir()
    network, processor = make(folder, *arguments)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim > 1 and not tensor.any():
                tensor.normal_(std=0.2)  # heads that begin with no effect at all
            elif tensor.ndim > 1 and "embed" not in name:
                tensor.mul_(factor)
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return network, processor

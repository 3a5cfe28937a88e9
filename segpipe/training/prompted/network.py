"""EdgeTAM's network for images, small and from scratch: how it begins, and its two halves with gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EdgeTamConfig, EdgeTamModel

from segpipe.errors import RequestError
from segpipe.models.transformers.folder import REFUSED

STEPS = 0.25 * np.array([1, 3, 5, 7, 9])
"""Waves over half a window, along x and along y, whose sines add up to a step: which side of a place."""
SLANTED = (0.5, 12.0)
"""The longest and the shortest of the other waves, which run in all directions."""
GOLDEN = np.pi * (3 - 5**0.5)
"""Angle between the directions of one wave and the next."""
HEADS = 4
"""Of attention: one for each edge of a box."""
STEEP = 3.1
"""Weight of a step's waves in queries and keys: a box's edge is about 8 elements wide."""
NEARNESS = 1.4
"""The same of waves that tell distance."""
GATE = 20.0
"""How firmly attention to a corner leaves other tokens out."""
QUIET = 0.2
"""Factor of weights that begin small."""


def build(config: dict[str, Any], seed: int) -> Any:
    """The network with random weights.

    Raises:
        RequestError: the library makes nothing of the configuration.
    """
    torch.manual_seed(seed)
    try:
        network = EdgeTamModel(EdgeTamConfig.from_dict(config))
    except (*REFUSED, RuntimeError) as error:
        raise RequestError(f"network: {' '.join(str(error).split())}") from error
    heads, width = (getattr(_first(network), name) for name in ("num_attention_heads", "head_dim"))
    if heads != HEADS or width <= 2 * len(STEPS):
        raise RequestError(
            f"network.mask_decoder_config: found {heads} heads of {width} channels; valid: {HEADS} heads of "
            f"{2 * len(STEPS) + 1} or more, e.g. hidden_size 96 with the usual downsampling by 2"
        )
    begin(network)
    return network


def _first(network: Any) -> Any:
    """The first attention of the image to tokens."""
    return network.mask_decoder.transformer.layers[0].cross_attn_image_to_token


@torch.no_grad()
def begin(network: Any) -> None:
    """Weights from which a decoder learns in minutes what a box is.

    The library's own are normal with deviation 0.02, with which a decoder from scratch stays where it is.
    From Glorot's uniform ones it takes thousands of steps to find that a mask lies between the corners of a
    box, since position reaches the image by attention alone. So attention begins with a meaning: in the first
    layer an element of the image looks at a corner if it lies on the box's side of it (`begin_sides`),
    elsewhere it looks at what is near (`begin_near`). Points and the image take one position code.
    """
    decoder, prompts = network.mask_decoder, network.prompt_encoder
    for name, module in network.named_modules():
        if "backbone" in name:
            continue
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
    count = network.shared_image_embedding.positional_embedding.shape[1]
    waves = position_code(count)
    for part in (network.shared_image_embedding, prompts.shared_embedding):
        part.positional_embedding.copy_(torch.from_numpy(waves))
    steps = np.arange(2 * len(STEPS))
    for tokens in (prompts.point_embed, decoder.mask_tokens, decoder.iou_token, decoder.obj_score_token):
        tokens.weight[:, np.concatenate([steps, steps + count])] = 0  # these channels are for places alone
    first, *others = decoder.transformer.layers
    for layer in (
        first.self_attn.q_proj,
        first.self_attn.k_proj,
        first.self_attn.v_proj,
        first.self_attn.o_proj,
    ):
        # This attention has no way around it: mixed at random, tokens would all become the same.
        nn.init.eye_(layer.weight)
    corners, nothing = prompts.point_embed.weight[2:4], decoder.obj_score_token.weight[0]
    begin_sides(first.cross_attn_image_to_token, corners, nothing, count)
    near = [first.cross_attn_token_to_image, decoder.transformer.final_attn_token_to_image]
    near += [
        a for layer in others for a in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)
    ]
    for attention in near:
        begin_near(attention, count)
    # What would drown the places comes in softly: at first a mask is a place, then it finds its edges.
    quiet = [decoder.conv_s0, decoder.conv_s1, *network.vision_encoder.neck.convs]
    quiet += [first.cross_attn_token_to_image.o_proj, first.mlp.proj_out]
    quiet += [layer.cross_attn_image_to_token.o_proj for layer in others]
    for module in [*quiet, *(head.proj_out for head in decoder.output_hypernetworks_mlps)]:
        module.weight.mul_(QUIET)


def position_code(count: int) -> np.ndarray:
    """Waves (2, count) over half a window, x and y: steps along x, steps along y, then slanted ones."""
    along = np.concatenate([STEPS, np.zeros_like(STEPS)])
    rest = np.arange(count - len(along))
    lengths = np.geomspace(*SLANTED, len(rest))
    slanted = np.stack([np.cos(rest * GOLDEN), np.sin(rest * GOLDEN)]) * lengths
    return np.hstack([np.stack([along, np.roll(along, len(STEPS))]), slanted])


def begin_sides(attention: Any, corners: torch.Tensor, nothing: torch.Tensor, count: int) -> None:
    """Four heads, for the left and the upper edge of a box (its first corner), the right and the lower one.

    In each an element chooses between the corner and a token that stands for nothing, by the sum of
    sin(m·(x − corner)) / m over the odd waves m of `STEPS`, which is positive on one side; other tokens are
    left out. What it then takes from the corner is the same whatever the place.

    Args:
        attention: of the image to tokens.
        corners: (2, c) what is added to the position code of first and last corners.
        nothing: (c,) a token.
        count: waves of the position code; sines come before cosines.
    """
    width, terms = attention.head_dim, len(STEPS)
    sizes = STEPS / STEPS[0]
    for head in range(HEADS):
        (corner, axis), top = divmod(head, 2), head * width
        waves = torch.from_numpy(np.arange(terms) + axis * terms)
        sign = 1 if corner == 0 else -1
        rows = torch.arange(top, top + terms)
        for layer in (attention.q_proj, attention.k_proj):
            layer.weight[top : top + width] *= 0.1
        attention.q_proj.weight[rows, waves] = STEEP
        attention.q_proj.weight[rows + terms, waves + count] = STEEP
        share = torch.from_numpy(sign * STEEP / sizes).float()
        attention.k_proj.weight[rows, waves + count] = share
        attention.k_proj.weight[rows + terms, waves] = -share
        gate, kind = top + 2 * terms, corners[corner]
        attention.q_proj.bias[gate] = GATE
        attention.k_proj.bias[gate] = -1
        attention.k_proj.weight[gate] = 0.5 * (kind / kind.square().sum() + nothing / nothing.square().sum())
        attention.v_proj.weight[top : top + width] *= QUIET
        attention.v_proj.weight[top] = kind / kind.square().sum()
        attention.o_proj.weight[:, top] *= 2 / attention.o_proj.weight[:, top].std()


def begin_near(attention: Any, count: int) -> None:
    """Attention whose logits fall with distance: each head compares some waves, the first the longest."""
    inner = attention.q_proj.weight.shape[0]
    chosen = np.linspace(2 * len(STEPS), count - 1, inner // 2).round().astype(int)
    heads = np.array_split(chosen, attention.num_attention_heads)
    rows = np.concatenate([np.concatenate([waves, waves + count]) for waves in heads])
    for layer in (attention.q_proj, attention.k_proj):
        layer.weight.mul_(0.5)
        layer.weight[torch.arange(len(rows)), torch.from_numpy(rows)] += NEARNESS


def encode(network: Any, images: torch.Tensor, bf16: bool = False) -> list[torch.Tensor]:
    """Embeddings, finest first: what `get_image_embeddings` gives, but with gradients, and of crops too.

    Args:
        network: as built.
        images: (b, c, y, x) windows, or crops of windows whose edge is a multiple of the patch size.
        bf16: compute in half of the bits.
    """
    whole = network.config.prompt_encoder_config.image_size
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        levels = [x.float() for x in network.get_image_features(images, return_dict=True).fpn_hidden_states]
    levels[-1] = levels[-1] + network.no_memory_embedding
    sizes = [[n * images.shape[-1] // whole for n in size] for size in network.backbone_feature_sizes]
    return [x.permute(1, 2, 0).reshape(len(images), -1, *n) for x, n in zip(levels, sizes, strict=True)]


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of n objects, alike."""

    of: torch.Tensor
    """(n,) int64: the window of each object."""
    boxes: torch.Tensor | None = None
    """(n, 4) x, y of first and last element."""
    points: torch.Tensor | None = None
    """(n, p, 2) x, y."""
    labels: torch.Tensor | None = None
    """(n, p) int64: 1 of the object, 0 beside it."""
    masks: torch.Tensor | None = None
    """(n, y, x) logits of before."""


def decode(
    network: Any,
    levels: list[torch.Tensor],
    asked: Asked,
    offset: tuple[int, int] = (0, 0),
    multimask: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, k, y, x) and predicted IoU (n, k): the network's own `forward`, of crops too.

    Args:
        network: as built.
        levels: of `encode`.
        asked: prompts; positions in elements of the crop.
        offset: (y, x) element of the window at which the crop begins, multiples of the patch size.
        multimask: three candidates; False: one.
    """
    patch = network.config.prompt_encoder_config.patch_size
    height, width = levels[-1].shape[-2:]
    at = (
        slice(offset[0] // patch, offset[0] // patch + height),
        slice(offset[1] // patch, offset[1] // patch + width),
    )
    shift = torch.tensor([offset[1], offset[0]], dtype=torch.float32)
    sparse, dense = network.prompt_encoder(
        input_points=None if asked.points is None else (asked.points + shift)[:, None],
        input_labels=None if asked.labels is None else asked.labels[:, None],
        input_boxes=None if asked.boxes is None else (asked.boxes + shift.repeat(2))[:, None],
        input_masks=None if asked.masks is None else asked.masks[:, None],
    )
    place = network.get_image_wide_positional_embeddings()[:, :, *at].expand(len(asked.of), -1, -1, -1)
    chosen = [level[asked.of] for level in levels]
    masks, iou, _, _ = network.mask_decoder(
        image_embeddings=chosen[-1],
        image_positional_embeddings=place,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense[..., :height, :width],
        multimask_output=multimask,
        high_resolution_features=chosen[:-1],
    )
    found = masks[:, 0]
    if asked.masks is not None:  # the answer is what is to be added (`segpipe.prompts.prior`)
        found = found + asked.masks[:, None]
    return found, iou[:, 0]


def save(network: Any, folder: Path) -> None:
    """Write the network as save_pretrained does, float16."""
    half = EdgeTamModel(network.config)
    half.load_state_dict(network.state_dict())
    half.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    # The library's version is no property of the network: the same weights give the same files.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

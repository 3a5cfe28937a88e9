"""Rows of the transformers library's networks that answer with queries: semantic, instance and panoptic.

Held against the library's image processors on the same windows. Three of their ways are not followed, as
`segpipe.objects.window` and `segpipe.models.providers.transformers.configs` say; the oracle is then the
processor's masks under the published rule, and its own map is counted beside it:

- instances overlap: the processor lets the last query paint over the others, segpipe the one with the
  highest score;
- MaskFormer and OneFormer answer with masks of a quarter of the resolution: the processor thresholds these
  and enlarges the result by nearest neighbour, segpipe enlarges probabilities and then thresholds;
- OneFormer's processor lets instances compete by logits as if these were probabilities.

Segments of one class of stuff are joined here: the processor gives two objects one id when told to
fuse them (`tests/instances/test_window.py`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import transformers as t
from torch.nn import functional

from benchmarks.rows import BANDS, CLASSES, Made, Row, Segments, class_fields, painted, write_card

Kind = Literal["semantic", "instance", "panoptic"]
KINDS: tuple[Kind, ...] = ("semantic", "instance", "panoptic")
QUERIES = 12
STUFF = 4
"""Classes from this value on are no things, in panoptic rows."""
SCORE = 0.3
OVERLAP = 0.3
TOKENS = [49, 3, 12, 7, 50]
"""Stand for the words that tell OneFormer its task."""
TASK_LENGTH = 20
STAGES = ["stage1", "stage2", "stage3", "stage4"]
HEADS = ("class_predictor", "class_embed", "class_labels_classifier")
DETR_WIDTH = 128


@dataclass(frozen=True)
class Family:
    """A network, its configuration for a number of labels and an edge, and its processor."""

    name: str
    architecture: str
    config: Callable[[int, int], Any]
    processor: Callable[[int], Any]
    kinds: tuple[Kind, ...] = KINDS
    edge: int = 256
    fixed: bool = False


def _swin(edge: int) -> Any:
    return t.SwinConfig(
        num_channels=BANDS, image_size=edge, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=8, out_features=STAGES,
    )  # fmt: skip


DECODER: dict[str, Any] = {
    "num_queries": QUERIES, "hidden_dim": 64, "dim_feedforward": 64, "encoder_feedforward_dim": 64,
    "num_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 3,
}  # fmt: skip


def _maskformer(labels: int, edge: int) -> Any:
    decoder = t.DetrConfig(
        d_model=64, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, num_queries=QUERIES
    )
    return t.MaskFormerConfig(
        backbone_config=_swin(edge), decoder_config=decoder, fpn_feature_size=64, mask_feature_size=64,
        num_labels=labels,
    )  # fmt: skip


def _mask2former(labels: int, edge: int) -> Any:
    return t.Mask2FormerConfig(
        backbone_config=_swin(edge), feature_size=64, mask_feature_size=64, num_labels=labels, **DECODER
    )


def _oneformer(labels: int, edge: int) -> Any:
    return t.OneFormerConfig(
        backbone_config=_swin(edge), conv_dim=64, mask_dim=64, query_dec_layers=1, task_seq_len=TASK_LENGTH,
        text_encoder_width=64, text_encoder_num_layers=1, num_labels=labels, **DECODER,
    )  # fmt: skip


def _eomt(labels: int, edge: int) -> Any:
    return t.EomtConfig(
        image_size=edge, hidden_size=64, num_attention_heads=2, num_hidden_layers=4, num_blocks=2,
        num_queries=QUERIES, num_register_tokens=0, num_channels=BANDS, patch_size=16, num_labels=labels,
    )  # fmt: skip


def _detr(labels: int, edge: int) -> Any:
    backbone = t.ResNetConfig(
        num_channels=BANDS, embedding_size=16, hidden_sizes=[16, 16, 32, 64], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=STAGES,
    )  # fmt: skip
    return t.DetrConfig(
        backbone_config=backbone, num_channels=BANDS, d_model=DETR_WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=QUERIES, num_labels=labels,
    )  # fmt: skip


def _one_former_processor(edge: int) -> Any:
    """Its class names come from a file, for otherwise it asks the hub for COCO's."""
    with tempfile.TemporaryDirectory() as folder:
        names = {str(k): {"isthing": 1, "name": f"c{k}"} for k in range(CLASSES)}
        (Path(folder) / "names.json").write_text(json.dumps(names))
        return t.OneFormerImageProcessor(repo_path=folder, class_info_file="names.json")


FAMILIES = (
    Family("MaskFormer", "MaskFormerForInstanceSegmentation", _maskformer,
           lambda _: t.MaskFormerImageProcessor()),
    # Its processor knows windows of 384 alone.
    Family("Mask2Former", "Mask2FormerForUniversalSegmentation", _mask2former,
           lambda _: t.Mask2FormerImageProcessor(), edge=384),
    Family("OneFormer", "OneFormerForUniversalSegmentation", _oneformer, _one_former_processor),
    Family("EoMT", "EomtForUniversalSegmentation", _eomt,
           lambda edge: t.EomtImageProcessor(size={"shortest_edge": edge, "longest_edge": edge}), fixed=True),
    Family("DETR", "DetrForSegmentation", _detr, lambda _: t.DetrImageProcessor(), ("semantic", "panoptic")),
)  # fmt: skip


def rows() -> list[Row]:
    """Each network in each of its kinds."""
    return [
        Row(
            f"{family.name} ({kind})",
            "transformers",
            partial(_make, family=family, kind=kind),
        )
        for family in FAMILIES
        for kind in family.kinds
    ]


def _make(folder: Path, family: Family, kind: Kind) -> Made:
    labels = CLASSES if kind == "semantic" else CLASSES - 1
    network_class = getattr(t, family.architecture)
    made = network_class(family.config(labels, family.edge)).eval()
    _spread(made, family.edge)
    made.save_pretrained(folder / "weights")
    # Mapped from the file as segpipe's: where tensors lie in memory changes the order of some sums.
    network = network_class.from_pretrained(folder / "weights", local_files_only=True).eval()
    card = write_card(
        folder,
        "transformers",
        architecture=family.architecture,
        weights="weights",
        arguments={"task_tokens": TOKENS} if family.name == "OneFormer" else {},
        window={"size": [family.edge], "fixed": family.fixed},
        output={
            "kind": kind,
            "activation": "none",
            "score": SCORE,
            "overlap": OVERLAP if kind == "panoptic" else 0.0,
        },
        classes=class_fields(background=kind != "semantic", stuff=STUFF if kind == "panoptic" else CLASSES),
    )
    oracle = Oracle(family, network, family.processor(family.edge))
    if kind == "semantic":
        return Made(card, labels=oracle.semantic)
    if kind == "panoptic":
        return Made(card, objects=oracle.panoptic)
    return Made(card, objects=oracle.instances, unchanged=oracle.own_instances)


def _spread(network: torch.nn.Module, edge: int) -> None:
    """Random weights whose queries are unlike each other, and that are sure of several classes."""
    for name, parameter in network.named_parameters():
        if any(head in name for head in HEADS):
            torch.nn.init.normal_(parameter, std=1.0)
        elif "bbox_attention" in name:  # DETR's masks begin with what each query looks at
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim == 2 and len(parameter) == QUERIES:
            torch.nn.init.normal_(parameter, std=3.0)
        elif "position" not in name and parameter.ndim > 1 and parameter.numel():
            torch.nn.init.kaiming_normal_(parameter)
        if name.endswith("mask_head.conv1.conv.weight"):
            parameter.data[:, DETR_WIDTH:] *= 100  # the channels that say so
    heads = [m for n, m in network.named_modules() if n.endswith(HEADS) and isinstance(m, torch.nn.Linear)]
    seen: list[torch.Tensor] = []
    hook = heads[0].register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    with torch.no_grad():
        _answer(network, torch.randn(1, BANDS, edge, edge))
        heads[0].bias.data -= seen[-1].mean((0, 1))  # what all queries have in common
    hook.remove()


def _answer(network: torch.nn.Module, x: torch.Tensor) -> Any:
    more = {}
    if isinstance(network, t.OneFormerForUniversalSegmentation):
        more["task_inputs"] = torch.tensor([TOKENS + [0] * (TASK_LENGTH - len(TOKENS))])
    return network(pixel_values=x, **more)


@dataclass
class Oracle:
    """The library's network and its processor; class values are its labels, after background."""

    family: Family
    network: torch.nn.Module
    processor: Any

    def semantic(self, x: torch.Tensor) -> np.ndarray:
        """(1, c, y, x) → (y, x)."""
        [found] = self.processor.post_process_semantic_segmentation(
            _answer(self.network, x), target_sizes=[tuple(x.shape[2:])]
        )
        return np.asarray(found.numpy())

    def panoptic(self, x: torch.Tensor) -> Segments:
        """The processor's segments, those of a class of stuff joined."""
        unfused: dict[str, Any] = {} if self.family.name == "EoMT" else {"label_ids_to_fuse": set()}
        [found] = self.processor.post_process_panoptic_segmentation(
            _answer(self.network, x),
            threshold=SCORE,
            overlap_mask_area_threshold=OVERLAP,
            target_sizes=[tuple(x.shape[2:])],
            **unfused,
        )
        segments = _of_map(found)
        first = {c: k for k, c in reversed(list(enumerate(segments.classes.tolist(), 1))) if c >= STUFF}
        joined = [0, *(first.get(c, k) for k, c in enumerate(segments.classes.tolist(), 1))]
        return Segments(np.array(joined)[segments.ids], segments.classes)

    def instances(self, x: torch.Tensor) -> Segments:
        """The processor's binary masks at the window's size, the one of highest score in front."""
        out, size = _answer(self.network, x), tuple(x.shape[2:])
        if self.family.name == "EoMT":  # gives no binary masks: asked for each query by itself
            found = [self._eomt_query(out, k, size) for k in range(QUERIES)]
            infos = [info for one in found for info in one["segments_info"]]
            masks = [(one["segmentation"] == 0).numpy() for one in found if one["segments_info"]]
        else:
            processor, logits = self.processor, out.masks_queries_logits
            if self.family.name != "Mask2Former":
                enlarged = functional.interpolate(logits.sigmoid(), size=size, mode="bilinear")
                logits = torch.logit(enlarged.double())
                processor = t.MaskFormerImageProcessor()
            [one] = processor.post_process_instance_segmentation(
                SimpleNamespace(class_queries_logits=out.class_queries_logits, masks_queries_logits=logits),
                threshold=SCORE,
                return_binary_maps=True,
            )
            infos, masks = one["segments_info"], list(one["segmentation"].numpy())
        if not infos:
            return Segments(np.zeros(size, np.int64), np.zeros(0, np.int64))
        classes = np.array([info["label_id"] + 1 for info in infos])
        return painted(np.stack(masks), classes, np.array([info["score"] for info in infos]))

    def _eomt_query(self, out: Any, k: int, size: tuple[int, ...]) -> Any:
        one = SimpleNamespace(
            class_queries_logits=out.class_queries_logits[:, k : k + 1],
            masks_queries_logits=out.masks_queries_logits[:, k : k + 1],
        )
        return self.processor.post_process_instance_segmentation(one, [size], threshold=SCORE)[0]

    def own_instances(self, x: torch.Tensor) -> Segments:
        """The processor's own map."""
        [found] = self.processor.post_process_instance_segmentation(
            _answer(self.network, x), threshold=SCORE, target_sizes=[tuple(x.shape[2:])]
        )
        return _of_map(found)


def _of_map(found: Any) -> Segments:
    """A processor's map and infos; ids there begin at 0 or 1."""
    segmentation, infos = found["segmentation"].numpy(), found["segments_info"]
    ids = np.zeros(segmentation.shape, np.int64)
    for k, info in enumerate(infos, 1):
        ids[segmentation == info["id"]] = k
    return Segments(ids, np.array([info["label_id"] + 1 for info in infos], np.int64))

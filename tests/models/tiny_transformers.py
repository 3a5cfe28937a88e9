"""Tiny networks of every family that the transformers adapter takes: 4 bands, 3 labels, random weights.

And their cards, and the library's own processors of their answers.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers as t

BANDS = 4
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swin():
    return t.SwinConfig(
        num_channels=BANDS,
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=STAGES,
    )


def convnext():
    return t.ConvNextConfig(
        num_channels=BANDS, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=STAGES
    )


def resnet():
    return t.ResNetConfig(
        num_channels=BANDS,
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=STAGES,
    )


PLAIN_VIT = {"num_channels": BANDS, "image_size": 64, "patch_size": 16, "hidden_size": 16}
ATTENTION = {"num_attention_heads": 2, "num_hidden_layers": 4}
MASK_DECODER = {
    "num_queries": 12,
    "hidden_dim": 32,
    "dim_feedforward": 16,
    "encoder_feedforward_dim": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
}
EOMT = {
    "image_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_blocks": 1,
    "num_queries": 12,
    "num_register_tokens": 0,
}
CONFIGS = {
    "UperNetForSemanticSegmentation": lambda: t.UperNetConfig(
        backbone_config=convnext(), hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=16, num_labels=3
    ),
    "MobileNetV2ForSemanticSegmentation": lambda: t.MobileNetV2Config(
        num_channels=BANDS, depth_multiplier=0.25, output_stride=8, num_labels=3
    ),
    "BeitForSemanticSegmentation": lambda: t.BeitConfig(
        **PLAIN_VIT,
        **ATTENTION,
        intermediate_size=16,
        out_indices=[1, 2, 3, 4],
        pool_scales=[1, 2],
        auxiliary_channels=8,
        use_relative_position_bias=True,
        num_labels=3,
    ),
    "DPTForSemanticSegmentation": lambda: t.DPTConfig(
        **PLAIN_VIT,
        **ATTENTION,
        intermediate_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=16,
        num_labels=3,
    ),
    "MaskFormerForInstanceSegmentation": lambda: t.MaskFormerConfig(
        backbone_config=swin(),
        decoder_config=t.DetrConfig(
            d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_queries=12
        ),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    ),
    "Mask2FormerForUniversalSegmentation": lambda: t.Mask2FormerConfig(
        backbone_config=swin(),
        feature_size=32,
        mask_feature_size=32,
        num_labels=3,
        **MASK_DECODER,
    ),
    "OneFormerForUniversalSegmentation": lambda: t.OneFormerConfig(
        backbone_config=swin(),
        conv_dim=32,
        mask_dim=32,
        query_dec_layers=1,
        task_seq_len=20,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        num_labels=3,
        **MASK_DECODER,
    ),
    "EomtForUniversalSegmentation": lambda: t.EomtConfig(
        **EOMT, num_channels=BANDS, patch_size=16, num_labels=3
    ),
    "DetrForSegmentation": lambda: t.DetrConfig(
        backbone_config=resnet(),
        num_channels=BANDS,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        num_labels=3,
    ),
}
HEADS = ("class_predictor", "class_embed", "class_labels_classifier")


def tiny(architecture):
    """The library's network; its queries are unlike each other, and it is sure of some classes."""
    network = getattr(t, architecture)(CONFIGS[architecture]()).eval()
    for name, parameter in network.named_parameters():
        if any(head in name for head in HEADS):
            torch.nn.init.normal_(parameter, std=1.0)
        elif "bbox_attention" in name:  # DETR's masks begin with what each query looks at
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim == 2 and len(parameter) == 12:  # one row a query
            torch.nn.init.normal_(parameter, std=3.0)
        elif "position" not in name and parameter.ndim > 1 and parameter.numel():
            torch.nn.init.kaiming_normal_(parameter)
        if name.endswith("mask_head.conv1.conv.weight"):
            parameter.data[:, 128:] *= 100  # the channels that say so
    balance(network)
    return network


def balance(network):
    """Take what all queries have in common out of the class logits, so that they are of several classes."""
    heads = [m for n, m in network.named_modules() if n.endswith(HEADS) and isinstance(m, torch.nn.Linear)]
    if not heads:
        return
    seen = []
    hook = heads[0].register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    more = {}
    if isinstance(network, t.OneFormerForUniversalSegmentation):
        more["task_inputs"] = torch.ones(1, network.config.task_seq_len)
    with torch.no_grad():
        network(pixel_values=torch.randn(1, BANDS, 64, 64), **more)
        heads[0].bias -= seen[-1].mean((0, 1))
    hook.remove()


TOKENS = [49, 3, 12, 7, 50]
LOW_RESOLUTION = ["MaskFormerForInstanceSegmentation", "OneFormerForUniversalSegmentation"]
QUERIES = [*LOW_RESOLUTION, "Mask2FormerForUniversalSegmentation", "EomtForUniversalSegmentation"]
QUERIES += ["DetrForSegmentation"]


def one_former_processor():
    """Its class names come from a file, for otherwise it asks the hub for COCO's."""
    with tempfile.TemporaryDirectory() as folder:
        names = {str(k): {"isthing": 1, "name": f"c{k}"} for k in range(3)}
        (Path(folder) / "names.json").write_text(json.dumps(names))
        return t.OneFormerImageProcessor(repo_path=folder, class_info_file="names.json")


SEEDS = dict(zip(QUERIES, ((1, 5), (2, 4), (1, 7), (0, 4), (7,)), strict=True))
"""Random weights that find several objects."""
PROCESSORS = dict(
    zip(
        QUERIES,
        (
            t.MaskFormerImageProcessor,
            one_former_processor,
            t.Mask2FormerImageProcessor,
            lambda: t.EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}),
            t.DetrImageProcessor,
        ),
        strict=True,
    )
)


def saved(folder, architecture):
    direct = tiny(architecture)
    direct.save_pretrained(folder / "net")
    return direct


def card_for(make_card, architecture, kind="semantic", **fields):
    square = architecture.startswith(("Beit", "DPT", "Eomt"))
    queries = architecture in QUERIES
    defaults = {
        "architecture": architecture,
        "window": {"fixed": True} if square else {},
        "output": {
            "kind": kind,
            "activation": "none" if queries else "softmax",
            "score": 0.4,
            "overlap": 0.3,
        },
        "arguments": {"task_tokens": TOKENS} if architecture.startswith("OneFormer") else {},
    }
    return make_card("transformers", **{"weights": "net", **defaults, **fields})


def answer(direct, batch):
    """The library's own output; OneFormer is told its task by the tokens, zeros after them."""
    more = {}
    if isinstance(direct, t.OneFormerForUniversalSegmentation):
        more["task_inputs"] = torch.tensor([TOKENS + [0] * (20 - len(TOKENS))] * len(batch))
    with torch.inference_mode():
        return direct(pixel_values=batch, **more)

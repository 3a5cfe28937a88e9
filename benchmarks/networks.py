"""One network of every family, as its own library builds it: random weights, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from benchmarks.rows import BANDS, CLASSES, Made, Row, best, write_card

Call = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""The library's own way from an image (1, c, …) to scores (1, k, …) of its size."""


@dataclass(frozen=True)
class Family:
    """A network and the card that names it."""

    name: str
    provider: str
    architecture: str
    make: Callable[[], torch.nn.Module]
    call: Call
    arguments: dict[str, Any] = field(default_factory=dict)
    stride: int = 32
    size: int = 256
    fixed: bool = False
    activation: str = "softmax"
    ndim: int = 2


def plain(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A network that answers with logits of the image's size, or of a whole fraction of it."""
    scores: torch.Tensor = module(x)
    return _sized(scores, x)


def _sized(scores: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if scores.shape[2:] == x.shape[2:]:
        return scores
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(scores, size=x.shape[2:], mode=mode, align_corners=False)


def _out(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = module(x)["out"]
    return scores


def _logits(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _sized(module(pixel_values=x).logits, x)


def _smp(architecture: str, encoder: str = "resnet18", **more: Any) -> Family:
    import segmentation_models_pytorch as smp

    stride = {"PSPNet": 8, "PAN": 16, "DeepLabV3": 8, "DeepLabV3Plus": 16}.get(architecture, 32)
    arguments = {"encoder_name": encoder, **more}
    return Family(
        f"{architecture} ({encoder})", "smp", architecture,
        lambda: getattr(smp, architecture)(
            encoder_weights=None, in_channels=BANDS, classes=CLASSES, **arguments
        ),
        plain, arguments, stride,
    )  # fmt: skip


def _even(network: torch.nn.Module, last: torch.nn.Module, call: Call) -> None:
    """Random MobileNets give all elements one class: let norms see something, and put no class ahead."""
    noise = torch.randn(4, BANDS, 64, 64)
    with torch.no_grad():
        for _ in range(20):
            call(network.train(), noise)
        last.bias -= call(network.eval(), noise).mean((0, 2, 3))  # type: ignore[operator]


def _torchvision(name: str) -> Family:
    from torchvision.models import segmentation

    def make() -> torch.nn.Module:
        network: torch.nn.Module = getattr(segmentation, name)(
            weights=None, weights_backbone=None, num_classes=CLASSES
        )
        first = network.backbone["0"] if "mobilenet" in name else network.backbone  # type: ignore[index,operator]
        key = 0 if "mobilenet" in name else "conv1"
        old = first[key]
        first[key] = torch.nn.Conv2d(
            BANDS, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
        )
        if name.startswith("lraspp"):
            _even(network, network.get_submodule("classifier.low_classifier"), _out)
        return network

    return Family(name, "torchvision", name, make, _out, stride=16 if "mobilenet" in name else 8)


def _monai(architecture: str, ndim: int, stride: int, **arguments: Any) -> Family:
    from monai.networks import nets

    factory = getattr(nets, architecture)
    channels = BANDS if ndim == 2 else 1

    def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = module(x)
        return plain(lambda _: scores[0] if isinstance(scores, list) else scores, x)  # type: ignore[arg-type]

    return Family(
        f"{architecture} {ndim}D", "monai", architecture,
        lambda: factory(spatial_dims=ndim, in_channels=channels, out_channels=CLASSES, **arguments),
        call, arguments, stride, 256 if ndim == 2 else 64 if stride < 32 else 96, ndim=ndim,
        fixed="img_size" in arguments,  # its positions are learned
    )  # fmt: skip


def literature(name: str, stride: int, fixed: bool = False, **arguments: Any) -> Family:
    """A network of `segpipe.models.providers.builtin`."""
    from segpipe.models.providers.builtin import ARCHITECTURES

    return Family(
        name, "literature", name,
        lambda: ARCHITECTURES[name](in_channels=BANDS, classes=CLASSES, **arguments),
        plain, arguments, stride, fixed=fixed,
    )  # fmt: skip


def _transformers(name: str, config: Callable[[], Any], stride: int, fixed: bool = False) -> Family:
    import transformers

    def make() -> torch.nn.Module:
        network: torch.nn.Module = getattr(transformers, name)(config())
        if name.startswith("MobileNetV2"):
            _even(network, network.get_submodule("segmentation_head.classifier.convolution"), _logits)
        return network

    return Family(name, "transformers", name, make, _logits, stride=stride, fixed=fixed)


def family_card(family: Family, direct: torch.nn.Module, folder: Path, name: str = "card") -> Path:
    """The family's card in a folder, with the network's weights beside it."""
    weights = f"{name}-weights"
    if family.provider == "transformers":
        direct.save_pretrained(folder / weights)  # type: ignore[operator]
    else:
        weights += ".safetensors"
        save_file({k: v.clone().contiguous() for k, v in direct.state_dict().items()}, folder / weights)
    return write_card(
        folder,
        family.provider,
        family.ndim,
        name,
        architecture=family.architecture,
        arguments=family.arguments,
        weights=weights,
        window={
            "size": [family.size],
            "halo": [family.size // 8],
            "stride": family.stride,
            "fixed": family.fixed,
        },
        output={"activation": family.activation},
    )


def probabilities(family: Family, direct: torch.nn.Module) -> Call:
    """The library's own call up to the softmax, channels innermost in memory where segpipe has them so."""
    innermost = family.provider in ("smp", "torchvision", "literature")
    if innermost:
        direct.to(memory_format=torch.channels_last)

    def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if innermost else x
        return family.call(module, x).float().softmax(1)

    return call


def rows() -> list[Row]:
    """A line of the table for each."""

    def row(family: Family) -> Row:
        def make(folder: Path) -> Made:
            direct = family.make().eval()
            card = family_card(family, direct, folder)
            call = probabilities(family, direct)
            return Made(card, lambda x: best(call(direct, x)))

        return Row(family.name, family.provider, make, family.ndim)

    return [row(family) for family in families()]


def families() -> list[Family]:
    """All of them, by provider."""
    import transformers as t

    unet = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
    kernels = {
        "kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2],
        "filters": [16, 32, 64, 128],
    }  # fmt: skip
    volumes = [
        _monai("UNet", 3, 8, **unet),
        _monai("BasicUNetPlusPlus", 3, 16, features=(8, 8, 16, 32, 64, 8)),
        _monai("AttentionUnet", 3, 8, channels=(8, 16, 32, 64), strides=(2, 2, 2)),
        _monai("VNet", 3, 16),
        _monai("DynUNet", 3, 8, **kernels),
        _monai("SegResNet", 3, 8, init_filters=8),
        _monai("UNETR", 3, 16, img_size=64, feature_size=8, hidden_size=192, mlp_dim=384, num_heads=6),
        _monai("SwinUNETR", 3, 32, feature_size=12),
    ]
    labels: dict[str, Any] = {"num_labels": CLASSES}
    vit: dict[str, Any] = {
        "num_channels": BANDS,
        "image_size": 256,
        "patch_size": 16,
        "hidden_size": 192,
        "intermediate_size": 384,
    }
    depth: dict[str, Any] = {"num_attention_heads": 3, "num_hidden_layers": 4}
    return [
        *(_smp(name) for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN")),
        *(_smp(name) for name in ("DeepLabV3", "DeepLabV3Plus", "UPerNet")),
        _smp("Segformer", "mit_b0"),
        _smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True),
        _smp("Unet", "tu-hrnet_w18"),
        *(_torchvision(n) for n in ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")),
        _monai("UNet", 2, 8, **unet),
        _monai("SegResNet", 2, 8, init_filters=16),
        *volumes,
        _transformers(
            "SegformerForSemanticSegmentation", lambda: t.SegformerConfig(num_channels=BANDS, **labels), 32
        ),
        _transformers(
            "UperNetForSemanticSegmentation",
            lambda: t.UperNetConfig(
                backbone_config=t.ConvNextConfig(
                    num_channels=BANDS, hidden_sizes=[32, 64, 96, 128], depths=[2, 2, 2, 2],
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                hidden_size=64, auxiliary_in_channels=96, **labels,
            ),
            32,
        ),
        _transformers(
            "BeitForSemanticSegmentation",
            lambda: t.BeitConfig(
                **vit, **depth, out_indices=[1, 2, 3, 4], auxiliary_channels=32,
                use_relative_position_bias=True, **labels,
            ),
            16, fixed=True,
        ),
        _transformers(
            "DPTForSemanticSegmentation",
            lambda: t.DPTConfig(
                **vit, **depth, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[24, 48, 96, 96],
                fusion_hidden_size=32, **labels,
            ),
            16, fixed=True,
        ),
        _transformers(
            "MobileNetV2ForSemanticSegmentation",
            lambda: t.MobileNetV2Config(num_channels=BANDS, output_stride=16, **labels), 16,
        ),
        literature("SegNet", 32),
        literature("DeepLabV1", 8),
        literature("DeepLabV2", 8, depth=18),
        literature("SETRNaive", 16, fixed=True, vit_name="vit_tiny_patch16_224", img_size=256),
        literature("SETRPUP", 16, fixed=True, vit_name="vit_tiny_patch16_224", img_size=256),
    ]  # fmt: skip

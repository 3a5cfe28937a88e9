"""SegNet, SETR and DeepLab against torchvision, timm, the papers' numbers and analytic fields of view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models import vgg

from segpipe.models.providers.builtin import (
    ARCHITECTURES,
    SETRPUP,
    DeepLabV1,
    DeepLabV2,
    SegNet,
    SETRNaive,
)

VIT: dict[str, Any] = {"vit_name": "test_vit", "img_size": 64, "channels": 32}
SMALL: dict[str, dict[str, Any]] = {
    "SegNet": {"width": 1 / 8},
    "SETRNaive": VIT,
    "SETRPUP": VIT,
    "DeepLabV1": {"width": 1 / 8, "dropout": 0.0},
    "DeepLabV2": {"depth": 18},
}
STRIDES = {"SegNet": 32, "SETRNaive": 16, "SETRPUP": 16, "DeepLabV1": 8, "DeepLabV2": 8}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(name: str, **arguments: Any) -> Any:
    return ARCHITECTURES[name](**{"in_channels": 3, "classes": 3, **SMALL[name], **arguments})


def on_paper(cls: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """The network at its full size without its memory."""
    with torch.device("meta"):
        return cls(**{"in_channels": 3, **arguments})


def parameters(module: nn.Module, leave_out: str = "") -> int:
    return sum(
        p.numel() for name, p in module.named_parameters() if not (leave_out and name.startswith(leave_out))
    )


def settled(module: nn.Module) -> Any:
    """Batch norms with statistics and factors of their own, so that none is the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.uniform_(part.bias, -0.2, 0.2)
    return module.eval()


def test_all_five_are_there():
    assert set(ARCHITECTURES) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("bands", "classes"), [(1, 2), (6, 4)])
def test_any_number_of_bands_and_classes_in_logits_of_full_size(name, bands, classes):
    model = small(name, in_channels=bands, classes=classes)
    x = torch.randn(2, bands, 64, 64)
    found = settled(model)(x)
    assert found.shape == (2, classes, 64, 64)
    for band in range(bands):  # no band is left out
        other = x.clone()
        other[:, band] += 1
        assert not torch.allclose(model(other), found)


@pytest.mark.parametrize("name", SMALL)
def test_all_weights_learn(name):
    model = settled(small(name)).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.ndim > 1 and not bool(p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("name", SMALL)
def test_two_images_are_learnt_by_heart(name):
    model = small(name, classes=2, **({"img_size": 32} if "SETR" in name else {})).train()
    left = torch.zeros(32, 32, dtype=torch.long)
    left[:, :16] = 1
    truth = torch.stack([left, 1 - left])
    images = torch.randn(2, 3, 32, 32) * 0.1 + truth[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if name == "SegNet" else 2e-3)
    for _ in range(100):
        scores = model(images)
        accuracy = float((scores.argmax(1) == truth).float().mean())
        if accuracy == 1:
            break
        optimizer.zero_grad()
        functional.cross_entropy(scores, truth).backward()
        optimizer.step()
    assert accuracy == 1


@pytest.mark.parametrize("name", SMALL)
def test_channels_innermost_changes_nothing(name):
    model = settled(small(name)).requires_grad_(False)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_sizes_between_multiples_of_the_stride_are_refused(name):
    model = small(name)
    assert model.stride == STRIDES[name]
    with pytest.raises(ValueError, match=rf"input of 64 × {64 + model.stride // 2}; valid: .*multiples of"):
        model(torch.zeros(1, 3, 64, 64 + model.stride // 2))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SegNet", {"width": 0}, "width: found 0"),
        ("SegNet", {"classes": 0}, "classes: found 0"),
        ("DeepLabV1", {"dilation": 0}, "dilation: found 0"),
        ("DeepLabV2", {"depth": 19}, "depth: found 19"),
        ("DeepLabV2", {"rates": []}, "rates: found"),
        ("SETRNaive", {"vit_name": "resnet18"}, "vit_name: found 'resnet18'"),
        ("SETRPUP", {"img_size": 72}, "img_size: found 72"),
        ("SETRPUP", {"vit_name": "vit_small_patch14_dinov2", "img_size": 70}, "multiple of 8"),
    ],
)
def test_arguments_out_of_range_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(name, **arguments)


# Weights of others: the same names, the same answers.


def test_segnets_encoder_is_torchvisions_vgg16_bn():
    features = settled(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    model = SegNet(in_channels=3, classes=2).eval()
    model.encoder.load_state_dict(features.state_dict())
    maps: list[torch.Tensor] = []
    model.decoder[0].register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    x = torch.randn(1, 3, 64, 64)
    model(x)
    found = functional.max_pool2d(maps[0], 2)  # what was unpooled, pooled again
    assert torch.allclose(found, features(x), atol=1e-5)


def test_deeplab_v1s_features_take_torchvisions_vgg16():
    """On a constant image without borders, neither dilation nor the poolings' strides matter."""
    features = vgg.make_layers(vgg.cfgs["D"]).requires_grad_(False)
    model = DeepLabV1(in_channels=3, classes=2).requires_grad_(False)
    model.features.load_state_dict(features.state_dict())
    for layer in [*features, *model.features]:
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [n for n in reversed(layer.padding) for _ in range(2)]
    x = torch.rand(1, 3, 1, 1).expand(1, 3, 32, 32)
    found, expected = model.features(x), features(x)
    assert found.shape[2:] == (4, 4) and expected.shape[2:] == (1, 1) and float(expected.std()) > 0
    assert torch.allclose(found, expected.expand_as(found), rtol=1e-3, atol=1e-6)


def test_deeplab_v2s_backbone_is_torchvisions_dilated_resnet():
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    settled(theirs)
    model = DeepLabV2(in_channels=3, classes=2, depth=50).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    model.backbone.load_state_dict(state)
    theirs.avgpool = theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        expected = theirs(x).reshape(1, 2048, 4, 6)
        found = model.backbone.forward_features(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("cls", [SETRNaive, SETRPUP])
def test_setrs_features_are_timms_reshaped(cls):
    free = {"img_size": 64, "dynamic_img_size": True}
    vit = timm.create_model("test_vit", pretrained=False, num_classes=0, **free).eval()
    model = small(cls.__name__, **free).eval()
    model.backbone.load_state_dict(vit.state_dict())
    x = torch.randn(2, 3, 32, 96)
    (expected,) = vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert expected.shape[2:] == (2, 6)
    assert torch.allclose(model.features(x), expected, atol=1e-5)


def test_setr_takes_other_sizes_only_where_told():
    model = settled(small("SETRPUP", dynamic_img_size=True))
    fixed = settled(small("SETRPUP"))
    fixed.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(model(x), fixed(x), atol=1e-5)
    assert model(torch.randn(1, 3, 32, 96)).shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match=r"input of 32 × 64; valid: 64 × 64"):
        fixed(torch.randn(1, 3, 32, 64))


def test_setr_with_other_patches():
    model = small("SETRPUP", vit_name="vit_small_patch32_224")
    assert model.stride == 32 and model(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


# Sizes that the papers give.


def test_segnet_is_vgg16s_thirteen_convolutions_twice_and_117_mb():
    model = on_paper(SegNet, classes=12)
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    kernels = [p.shape for p in features.parameters() if p.ndim == 4]
    found = [p.shape for p in model.encoder.parameters() if p.ndim == 4]
    assert found == kernels and len(kernels) == 13
    mirrored = [(before, after, *size) for after, before, *size in reversed(kernels)]
    mirrored[-1] = (12, *mirrored[-1][1:])
    assert [tuple(p.shape) for p in model.decoder.parameters() if p.ndim == 4] == mirrored
    assert int(parameters(model) * 4 / 1e6) == 117  # "model size 117 MB" in the table of resources


def test_deeplab_v1_has_20_5_million_parameters():
    assert round(parameters(on_paper(DeepLabV1, classes=21)) / 1e6, 1) == 20.5  # table 2, LargeFOV


def test_deeplab_v2_is_resnet101_with_four_branches():
    published = 44_549_160 - (2048 * 1000 + 1000)  # torchvision's resnet101 less its classifier
    assert parameters(on_paper(DeepLabV2, classes=21)) == published + 4 * (2048 * 21 * 9 + 21)


def test_setrs_transformer_is_vit_large():
    """ViT-L/16 at 224 px has 304,326,632 parameters (torchvision); at 768 px more positions, and no head."""
    torchvisions = 304_326_632 - (1024 * 1000 + 1000)
    more_positions = (48 * 48 - 14 * 14) * 1024
    naive = on_paper(SETRNaive, classes=19)
    assert parameters(naive, "decoder") == torchvisions + more_positions
    head = 1024 * 256 + 256 + 2 * 256 + 256 * 19 + 19
    assert parameters(naive.decoder) == head


# What each is known for.


def test_max_unpooling_puts_each_maximum_back_where_it_was():
    """Each stage of the decoder sees values where the encoder's map had its maxima, and else 0."""
    model = settled(small("SegNet"))
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    pools = [layer for layer in model.encoder if isinstance(layer, nn.MaxPool2d)]
    for pool, stage in zip(pools, reversed(model.decoder), strict=True):
        pool.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        stage.register_forward_pre_hook(lambda _, inputs: after.append(inputs[0]))
    model(torch.randn(1, 3, 64, 96))
    for given, sparse in zip(before, reversed(after), strict=True):
        assert given.shape == sparse.shape
        blocks = given.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (n, c, y/2, x/2, 4)
        put = sparse.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        where = nn.functional.one_hot(blocks.argmax(-1), 4).bool()
        assert not bool(put[~where].any())  # nothing anywhere else
        assert bool(put[where].any())
    # The deepest map is unpooled as it was pooled: maxima themselves come back.
    blocks = before[-1].unfold(2, 2, 2).unfold(3, 2, 2)
    put = after[0].unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.equal(put.flatten(4).sum(-1), blocks.flatten(4).amax(-1))


def test_aspp_is_the_sum_of_four_atrous_convolutions():
    model = settled(small("DeepLabV2"))
    x = torch.randn(1, 3, 64, 80)
    features = model.backbone.forward_features(x)
    state = model.state_dict()
    total = torch.zeros(1, 3, 8, 10)
    for number, rate in enumerate((6, 12, 18, 24)):
        weight, bias = state[f"aspp.{number}.weight"], state[f"aspp.{number}.bias"]
        padded = functional.pad(features, [rate] * 4)
        for a in range(3):
            for b in range(3):
                shifted = padded[..., a * rate : a * rate + 8, b * rate : b * rate + 10]
                total += torch.einsum("ncyx,kc->nkyx", shifted, weight[:, :, a, b])
        total += bias[None, :, None, None]
    expected = functional.interpolate(total, size=(64, 80), mode="bilinear", align_corners=False).detach()
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))


def width_of(layers: Sequence[tuple[int, int, int]]) -> int:
    """Field of view of kernels (size, stride, dilation) in a row: 1 + Σ (size − 1)·dilation·step."""
    total, step = 1, 1
    for size, stride, dilation in layers:
        total += (size - 1) * dilation * step
        step *= stride
    return total


def conv(times: int, dilation: int = 1) -> list[tuple[int, int, int]]:
    return [(3, 1, dilation)] * times


VGG = [
    *conv(2),
    (2, 2, 1),
    *conv(2),
    (2, 2, 1),
    *conv(3),
    (2, 2, 1),
    *conv(3),
    (3, 1, 1),
    *conv(3, 2),
    (3, 1, 1),
]
RESNET18 = [
    (7, 2, 1),
    (3, 2, 1),
    *conv(4),
    (3, 2, 1),
    *conv(3),
    *conv(1),
    *conv(3, 2),
    *conv(1, 2),
    *conv(3, 4),
]


def probed(module: nn.Module, answer: nn.Module, edge: int) -> int:
    """Width of what one element in the middle of `answer`'s output depends on, by its gradient.

    Every weight is positive and every maximum a mean, so that no path is closed. The image is one row high.
    """
    for p in module.parameters():
        nn.init.constant_(p, 1 / p[0].numel() if p.ndim > 1 else 1.0)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(part, name, mean)
    seen: list[torch.Tensor] = []
    answer.register_forward_hook(lambda *args: seen.append(args[2]))
    x = torch.ones(1, 1, 8, edge, dtype=torch.float64, requires_grad=True)
    module.double().eval()(x)
    seen[0][0, 0, 0, edge // 16].backward()
    columns = (x.grad != 0).any(2).flatten().nonzero()
    assert int(columns.min()) > 0 and int(columns.max()) < edge - 1, "the image is too small"
    return int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("dilation", [4, 12])
def test_deeplab_v1_sees_as_far_as_its_layers_say(dilation):
    model = small("DeepLabV1", in_channels=1, dilation=dilation)
    expected = width_of([*VGG, (3, 1, dilation)])
    assert probed(model, model.fc8, 640) == expected
    if dilation == 12:
        assert expected == 412  # as the docstring says
        # The paper's field of view is that of fc6 alone, on elements of 32 px (VGG's stride).
        assert width_of([(2, 2, 1)] * 3 + [(3, 1, 12)]) - width_of([(2, 2, 1)] * 3) + 32 == 224


def test_deeplab_v2_sees_as_far_as_its_layers_say():
    model = small("DeepLabV2", in_channels=1)
    assert probed(model, model.aspp[-1], 1280) == width_of([*RESNET18, (3, 1, 24)])


@pytest.mark.parametrize(("name", "far"), [("DeepLabV1", 320), ("DeepLabV2", 512), ("SegNet", 480)])
def test_moving_the_image_by_the_stride_moves_the_answer(name, far):
    """And moving it by half a stride does not: the stride is the smallest such."""
    model = settled(small(name)).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 4 and p.shape[0] == 3:  # the scores' convolution: scores of about 1
            nn.init.normal_(p)
    stride = model.stride
    image = torch.randn(1, 3, 32, 2 * far + 4 * stride)
    inner = slice(far, far + 2 * stride)
    expected = model(image)[..., inner]
    for step, moves in ((stride, True), (stride // 2, False)):
        found = model(functional.pad(image, [step, -step]))[..., far + step : far + step + 2 * stride]
        error = float((found - expected).abs().max() / expected.std())
        assert (error < 1e-3) is moves, (step, error)

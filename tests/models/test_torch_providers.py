"""smp, MONAI, transformers and TorchScript: the adapter's answer is the library's own."""

from __future__ import annotations

import json
from pathlib import Path

import monai.networks.nets as nets
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file, save_model
from torch.nn.functional import interpolate

from segpipe.config.card import load_card
from segpipe.errors import RequestError
from segpipe.models.registry import check_card, load_model

SMP = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3"]
SMP += ["DeepLabV3Plus", "UPerNet", "Segformer"]
CONFIGS = Path(__file__).parents[2] / "configs" / "models"

# The library's network and the adapter's on as many threads: their number is part of the bits.
pytestmark = pytest.mark.usefixtures("one_thread")


def smp_module(architecture: str, **arguments):
    module = smp.create_model(
        architecture, "resnet18", encoder_weights=None, in_channels=4, classes=3, **arguments
    )
    return module.eval()


def smp_card(make_card, architecture: str, weights: str = "w.safetensors", **fields):
    fields = {"arguments": {"encoder_name": "resnet18"}, **fields}
    return make_card("smp", weights, architecture=architecture, **fields)


@pytest.mark.parametrize("architecture", SMP)
def test_smp_equals_the_library(make_card, tmp_path, architecture):
    direct = smp_module(architecture)
    save_file(direct.state_dict(), tmp_path / "w.safetensors")
    model = load_model(smp_card(make_card, architecture), "cpu", 1, "fp32")
    batch = torch.randn(2, 4, 128, 160)  # PAN pools eight times beyond its stride of 16
    with torch.inference_mode():
        plain = direct(batch)
        direct.to(memory_format=torch.channels_last)
        expected = direct(batch.contiguous(memory_format=torch.channels_last))
    found = model(batch)
    assert torch.equal(found, expected)
    # Channels innermost changes the order of sums, and nothing else.
    assert torch.allclose(found, plain, atol=1e-4 * float(plain.abs().max()))
    assert float(found.std()) > 0
    assert found.is_contiguous()


def test_smp_float16_file_answers_as_its_rounded_weights(make_card, tmp_path):
    direct = smp_module("Unet")
    half = {k: v.half() if v.is_floating_point() else v for k, v in direct.state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    model = load_model(smp_card(make_card, "Unet"), "cpu", 1, "fp32")
    direct.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    direct.to(memory_format=torch.channels_last)
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        expected = direct(batch.contiguous(memory_format=torch.channels_last))
    assert torch.equal(model(batch), expected)


def test_smp_sigmoid_has_one_channel(make_card, tmp_path):
    direct = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=1).eval()
    save_file(direct.state_dict(), tmp_path / "w.safetensors")
    card = smp_card(make_card, "Unet", classes=2, output={"activation": "sigmoid"})
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        expected = direct(batch)
    assert torch.allclose(load_model(card, "cpu", 1, "fp32")(batch), expected, atol=1e-4)


def test_smp_never_fetches_an_encoder(make_card, tmp_path):
    save_file(smp_module("Unet").state_dict(), tmp_path / "w.safetensors")
    arguments = {"encoder_name": "resnet18", "encoder_weights": "imagenet"}
    card = smp_card(make_card, "Unet", arguments=arguments)
    # Without the hub this would fail if it tried.
    assert load_model(card, "cpu", 1, "fp32")(torch.zeros(1, 4, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"architecture": "Unett"}, "architecture: found 'Unett'; did you mean Unet"),
        ({"arguments": {"encoder_name": "resnet19"}}, "arguments: Unet refuses"),
        (
            {"arguments": {"encoder_name": "resnet18", "encoder_deepth": 3}},
            "arguments.encoder_deepth: unknown",
        ),
        ({"arguments": {"classes": 5}}, "arguments.classes: found 5; it follows from the card"),
        ({"arguments": {"in_channels": 3}}, "arguments.in_channels: found 3"),
        ({"window": {"stride": 16}}, "window.stride: found 16; this network's total stride is 32"),
        ({"bands": 5}, "weights: encoder.conv1.weight is (64, 4, 7, 7)"),
        ({"classes": 4}, "weights: segmentation_head.0.bias is (3,) in w.safetensors, and (4,)"),
        (
            {"arguments": {"encoder_name": "resnet34"}},
            "weights: w.safetensors lacks encoder.layer1.2.conv1.weight (",
        ),
        ({"architecture": "FPN"}, "lacks decoder.p5.weight (29 missing) and has decoder.blocks."),
    ],
)
def test_smp_mistakes_name_the_field(make_card, tmp_path, fields, told):
    save_file(smp_module("Unet").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RequestError) as error:
        load_model(smp_card(make_card, **{"architecture": "Unet", **fields}), "cpu", 1, "fp32")
    assert str(error.value).startswith("trial: ")
    assert told in str(error.value)


def test_weights_with_nan_are_refused(make_card, tmp_path):
    state = smp_module("Unet").state_dict()
    state["encoder.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match=r"weights: encoder\.conv1\.weight .* NaN"):
        load_model(smp_card(make_card, "Unet"), "cpu", 1, "fp32")


UNET = {"channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1}
DYNUNET = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 16],
    "norm_name": ["INSTANCE", {"affine": True}],
}
MONAI = [
    ("raster", "UNet", UNET),
    ("volume", "UNet", UNET),
    ("volume", "SegResNet", {"init_filters": 8, "blocks_down": [1, 2], "blocks_up": [1]}),
    ("volume", "DynUNet", DYNUNET),
    ("raster", "DynUNet", {**DYNUNET, "deep_supervision": True, "deep_supr_num": 1}),
    ("volume", "BasicUNetPlusPlus", {"features": [4, 4, 8, 8, 16, 4]}),
    ("raster", "AttentionUnet", {"channels": [4, 8, 16], "strides": [2, 2]}),
]


@pytest.mark.parametrize(("kind", "architecture", "arguments"), MONAI)
def test_monai_equals_the_library(make_card, tmp_path, kind, architecture, arguments):
    axes = 2 if kind == "raster" else 3
    factory = getattr(nets, architecture)
    direct = factory(spatial_dims=axes, in_channels=2, out_channels=3, **arguments).eval()
    save_model(direct, str(tmp_path / "w.safetensors"))  # drops DynUNet's second names
    card = make_card(
        "monai",
        "w.safetensors",
        kind=kind,
        bands=2,
        architecture=architecture,
        arguments=arguments,
        window={"stride": 16},
    )
    batch = torch.randn(2, 2, *(32, 16, 48)[:axes])
    with torch.inference_mode():
        expected = direct(batch)
        expected = expected[0] if isinstance(expected, list) else expected
    found = load_model(card, "cpu", 1, "fp32")(batch)
    assert torch.equal(found, expected)
    assert float(found.std()) > 0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"architecture": "Unet"}, "architecture: found 'Unet'; did you mean UNet"),
        ({"architecture": "FullyConnectedNet"}, "architecture: found 'FullyConnectedNet'"),
        ({"architecture": "os.system"}, "architecture: found 'os.system'"),
        ({"arguments": {"_target_": "os.system"}}, "arguments: UNet refuses"),
        ({"arguments": {**UNET, "spatial_dims": 2}}, "arguments.spatial_dims: found 2"),
        ({"arguments": {**UNET, "channels": [4, 8, 32]}}, "in UNet; `arguments`"),
    ],
)
def test_monai_mistakes_name_the_field(make_card, tmp_path, fields, told):
    direct = nets.UNet(spatial_dims=3, in_channels=1, out_channels=3, **UNET)
    save_file(direct.state_dict(), tmp_path / "w.safetensors")
    fields = {"architecture": "UNet", "arguments": UNET, **fields}
    card = make_card("monai", "w.safetensors", kind="volume", bands=0, **fields)
    with pytest.raises(RequestError) as error:
        load_model(card, "cpu", 1, "fp32")
    assert told in str(error.value)


@pytest.fixture
def segformer(tmp_path: Path):
    """A tiny random SegFormer, saved as the library saves it."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_channels=4,
        num_labels=3,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    network = SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path / "net")
    return network


def segformer_card(make_card, **fields):
    fields = {"architecture": "SegformerForSemanticSegmentation", **fields}
    return make_card("transformers", "net", **fields)


@pytest.mark.parametrize("shape", [(64, 96), (50, 66)])
def test_segformer_equals_the_library_upsampled(make_card, segformer, shape):
    batch = torch.randn(2, 4, *shape)
    with torch.inference_mode():
        logits = segformer(pixel_values=batch).logits
    expected = interpolate(logits, size=shape, mode="bilinear", align_corners=False)
    found = load_model(segformer_card(make_card), "cpu", 1, "fp32")(batch)
    assert logits.shape[2] < shape[0]
    # Tensors mapped from a file lie elsewhere in memory, which can change the order of sums.
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_segformer_without_a_tensor_is_refused_not_filled_with_noise(make_card, tmp_path, segformer):
    from safetensors.torch import load_file

    path = tmp_path / "net" / "model.safetensors"
    state = load_file(path)
    gone = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != gone}, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=rf"weights: .*missing keys: {gone}"):
        load_model(segformer_card(make_card), "cpu", 1, "fp32")


def test_segformer_mistakes_name_the_field(make_card, tmp_path, segformer):
    for fields, told in [
        ({"bands": 3}, "input.bands: found 3"),
        ({"classes": 2}, "classes: the card needs 2"),
        ({"arguments": {"trust_remote_code": True}}, "arguments.trust_remote_code: unknown"),
        ({"architecture": "SegformerModel"}, "valid for provider transformers: "),
    ]:
        with pytest.raises(RequestError) as error:
            load_model(segformer_card(make_card, **fields), "cpu", 1, "fp32")
        assert told in str(error.value)
    config = tmp_path / "net" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "model_type": "bert"}))
    with pytest.raises(RequestError, match="model_type is 'bert'"):
        load_model(segformer_card(make_card), "cpu", 1, "fp32")


def test_segformer_runs_no_code_from_the_folder(make_card, tmp_path, segformer):
    config, marker = tmp_path / "net" / "config.json", tmp_path / "ran"
    (tmp_path / "net" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Net: ...\n")
    data = json.loads(config.read_text())
    data["auto_map"] = {"AutoModel": "evil.Net", "AutoModelForSemanticSegmentation": "evil.Net"}
    config.write_text(json.dumps(data))
    load_model(segformer_card(make_card), "cpu", 1, "fp32")
    assert not marker.exists()


def test_pickled_transformers_weights_are_not_read(make_card, tmp_path, segformer):
    (tmp_path / "net" / "model.safetensors").unlink()
    torch.save(segformer.state_dict(), tmp_path / "net" / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"weights: found no config.json with \*.safetensors"):
        load_model(segformer_card(make_card), "cpu", 1, "fp32")


@pytest.mark.parametrize("name", ["brain-box", "brain-volume"])
def test_deepbet_through_its_card_equals_the_file(name):
    pytest.importorskip("deepbet", reason="needs deepbet 1.0.2")
    from segpipe.models.weights import resolve_weights

    card = load_card(CONFIGS / f"{name}.yaml")
    direct = torch.jit.load(str(resolve_weights(card)), map_location="cpu").eval()
    batch = torch.randn(1, 1, 64, 64, 96) * 0.226 + 0.449
    with torch.inference_mode():
        expected = direct(batch)
    model = load_model(card, "cpu", 1, "fp32")
    for _ in range(3):  # the profiling optimiser could rewrite the program after a pass or two
        assert torch.equal(model(batch), expected)
    assert torch.allclose(expected.sum(dim=1), torch.ones(1, 64, 64, 96), atol=1e-5)


def test_torchscript_runs_only_when_the_card_allows_it(make_card, tmp_path):
    torch.jit.script(torch.nn.Conv2d(4, 3, 1)).save(str(tmp_path / "net.pt"))
    card = make_card("torchscript", "net.pt")
    with pytest.raises(RequestError, match="allow_torchscript: true"):
        check_card(card)
    with pytest.raises(RequestError, match="allow_torchscript: true"):
        load_model(card, "cpu", 1, "fp32")


def test_damaged_torchscript_and_arguments_are_refused(make_card, tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no program")
    card = make_card("torchscript", "net.pt", allow_torchscript=True)
    with pytest.raises(RequestError, match=r"weights: .* is not readable TorchScript"):
        load_model(card, "cpu", 1, "fp32")
    card = make_card("torchscript", "net.pt", allow_torchscript=True, arguments={"a": 1})
    with pytest.raises(RequestError, match=r"arguments\.a: unknown; this provider takes none"):
        load_model(card, "cpu", 1, "fp32")

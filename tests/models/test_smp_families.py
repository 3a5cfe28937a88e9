"""Every architecture of segmentation_models_pytorch, for any number of bands, against the library itself."""

import sys
from subprocess import run

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file

from segpipe.errors import RequestError
from segpipe.models.providers.smp import ARCHITECTURES
from segpipe.models.registry import load_model

TINY = {"encoder_name": "tu-test_resnet"}  # timm's, for tests: resnet18 is in test_torch_providers.py
VIT = {
    "encoder_name": "tu-test_vit",
    "decoder_intermediate_channels": [8, 8, 8, 8],
    "decoder_fusion_channels": 8,
}
CASES = [(name, TINY) for name in sorted(set(ARCHITECTURES) - {"DPT"})]
CASES += [("DPT", VIT)]
CASES += [pytest.param("Unet", {"encoder_name": "tu-hrnet_w18"}, marks=pytest.mark.slow)]


pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder, architecture, bands, arguments):
    """The library's own network, its weights in a file; channels innermost, as the adapter runs it."""
    direct = getattr(smp, architecture)(
        **{**arguments, "encoder_weights": None}, in_channels=bands, classes=3
    ).eval()
    save_file(direct.state_dict(), folder / "w.safetensors")
    return direct.to(memory_format=torch.channels_last)


def test_the_architectures_are_those_of_the_library():
    assert set(ARCHITECTURES) == {c.__name__ for c in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    assert len(CASES) == len(ARCHITECTURES) + 1 == 13


def test_checking_a_card_does_not_import_the_library(make_card, tmp_path):
    """It takes seconds, and a check needs only the names."""
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    make_card("smp", "w.safetensors", architecture="Unet", arguments=TINY)
    code = (
        "import sys\n"
        "from segpipe.config.card import load_card\n"
        "from segpipe.models.registry import check_card\n"
        f"check_card(load_card({str(tmp_path / 'trial.yaml')!r}))\n"
        "print('segmentation_models_pytorch' in sys.modules)"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


@pytest.mark.parametrize("bands", [2, 3, 8])
@pytest.mark.parametrize(("architecture", "arguments"), CASES)
def test_any_number_of_bands_equals_the_library(make_card, tmp_path, architecture, arguments, bands):
    direct = saved(tmp_path, architecture, bands, arguments)
    card = make_card("smp", "w.safetensors", bands=bands, architecture=architecture, arguments=arguments)
    size = 128 if architecture == "PAN" else 64  # PAN pools eight times beyond its stride of 16
    batch = torch.randn(1, bands, size, size)
    with torch.inference_mode():
        expected = direct(batch.contiguous(memory_format=torch.channels_last))
    found = load_model(card, "cpu", 1, "fp32")(batch)
    assert torch.equal(found, expected)
    assert float(found.std()) > 0


@pytest.mark.parametrize(
    ("architecture", "arguments", "stride"),
    [
        ("Unet", {**TINY, "encoder_depth": 3, "decoder_channels": [16, 8, 8]}, 8),
        ("PSPNet", TINY, 8),
        ("PAN", TINY, 16),
        ("DeepLabV3", TINY, 8),
        ("DeepLabV3Plus", {**TINY, "encoder_output_stride": 8}, 8),
        ("Linknet", TINY, 32),
        ("DPT", VIT, 32),
    ],
)
def test_total_stride_is_the_networks(make_card, tmp_path, architecture, arguments, stride):
    """Half the stride is refused, and the library itself takes windows of one odd multiple."""
    direct = saved(tmp_path, architecture, 4, arguments)
    fields = {"architecture": architecture, "arguments": arguments}
    with pytest.raises(
        RequestError, match=f"window.stride: found {stride // 2}; .* total stride is {stride}"
    ):
        load_model(
            make_card("smp", "w.safetensors", window={"stride": stride // 2}, **fields), "cpu", 1, "fp32"
        )
    card = make_card("smp", "w.safetensors", window={"size": [stride * 9], "stride": stride}, **fields)
    batch = torch.randn(1, 4, stride * 9, stride * 9)
    with torch.inference_mode():
        expected = direct(batch.contiguous(memory_format=torch.channels_last))
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)


def test_an_encoder_of_one_size_needs_that_window(make_card, tmp_path):
    arguments = {**VIT, "encoder_name": "tu-vit_tiny_patch16_224", "img_size": 64}
    direct = saved(tmp_path, "DPT", 4, arguments)
    fields = {"architecture": "DPT", "arguments": arguments}
    for window in ({"size": [96], "fixed": True}, {"size": [64]}):
        with pytest.raises(RequestError, match=r"window.size: found .*\[64, 64\]"):
            load_model(make_card("smp", "w.safetensors", window=window, **fields), "cpu", 1, "fp32")
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        expected = direct(batch.contiguous(memory_format=torch.channels_last))
        with pytest.raises(AssertionError, match="doesn't match model"):
            direct(torch.randn(1, 4, 96, 96))
    card = make_card("smp", "w.safetensors", window={"fixed": True}, **fields)
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)

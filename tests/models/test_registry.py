"""Loading once, arithmetic, and refusing a wrong card before any work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from safetensors.torch import save_file

from segpipe.config.card import load_card
from segpipe.config.job import Precision
from segpipe.errors import RequestError
from segpipe.models.registry import check_card, describe, list_cards, load_model, resolve_precision
from segpipe.prompts.prompt_scene import check_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "models"


@pytest.fixture
def card(make_card, tmp_path):
    """A U-Net with random weights, new for every test."""
    module = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=3)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    return make_card("smp", "w.safetensors", architecture="Unet", arguments={"encoder_name": "resnet18"})


def test_eight_threads_that_ask_at_once_get_one_model(card):
    barrier = Barrier(8)

    def ask(_: int):
        barrier.wait()
        return load_model(card, "cpu", 2, "fp32")

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(ask, range(8)))
    assert all(model is models[0] for model in models)
    assert load_model(card, "cpu", 2, "bf16") is not models[0]


def test_names_and_colours_load_nothing_again_but_other_weights_do(card, tmp_path):
    first = load_model(card, "cpu", 2, "fp32")
    path = tmp_path / "trial.yaml"
    data = yaml.safe_load(path.read_text())
    data["classes"][1]["name"] = "building"
    path.write_text(yaml.safe_dump(data))
    assert load_model(load_card(path), "cpu", 2, "fp32") is first
    other = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=3)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    second = load_model(card, "cpu", 2, "fp32")
    batch = torch.randn(1, 4, 32, 32)
    assert second is not first
    assert not torch.equal(second(batch), first(batch))


def test_eight_threads_predict_the_same_bits_as_one(card):
    model = load_model(card, "cpu", 2, "fp32")
    batches = [torch.randn(1, 4, 64, 64) for _ in range(16)]
    alone = [model(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model, batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_threads_are_set_in_whichever_thread_predicts(card):
    model = load_model(card, "cpu", 1, "fp32")

    def predict() -> int:
        torch.set_num_threads(2)
        model(torch.zeros(1, 4, 32, 32))
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(predict).result() == 1


@pytest.mark.usefixtures("one_thread")
def test_bfloat16_is_autocast_and_answers_in_float32(card):
    batch = torch.randn(1, 4, 64, 64)
    direct = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=3).eval()
    from safetensors.torch import load_file

    direct.load_state_dict(load_file(card.folder / "w.safetensors"))
    direct.to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = direct(batch.contiguous(memory_format=torch.channels_last)).float()
    found = load_model(card, "cpu", 1, "bf16")(batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, load_model(card, "cpu", 1, "fp32")(batch))


def test_a_stored_program_runs_as_stored_whatever_precision_is_asked(make_card, tmp_path):
    torch.jit.script(torch.nn.Conv2d(4, 3, 1)).save(str(tmp_path / "net.pt"))
    card = make_card("torchscript", "net.pt", allow_torchscript=True)
    assert load_model(card, "cpu", 2, "bf16") is load_model(card, "cpu", 2, "fp32")


def test_precision_auto_is_settled_by_device_and_provider(card, make_card):
    stored = make_card("onnx", "net.onnx")
    assert resolve_precision(card, Precision.auto, "cpu") == "fp32"
    assert resolve_precision(card, Precision.auto, "cuda:0") == "bf16"
    assert resolve_precision(card, Precision.fp16, "cuda") == "fp16"
    assert resolve_precision(stored, Precision.auto, "cuda") == "fp32"
    with pytest.raises(RequestError, match=r"compute\.precision: found bf16.*valid: auto or fp32"):
        resolve_precision(stored, Precision.bf16, "cuda")


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(card, device):
    with pytest.raises(RequestError, match=rf"compute\.device: found '{device}'"):
        load_model(card, device, 2, "fp32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_in_whole_float32_agrees_with_the_cpu(card):
    batch = torch.randn(2, 4, 64, 64)
    expected = load_model(card, "cpu", 2, "fp32")(batch)
    found = load_model(card, "cuda", 2, "fp32")(batch.cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weights": "gone.pt"}, "weights: no file at"),
        ({"architecture": "DeepLabV4"}, "architecture: found 'DeepLabV4'; did you mean DeepLabV3"),
        (
            {"window": {"size": [48]}},
            "window.size: found 48; valid: a positive multiple of window.stride 32",
        ),
        ({"window": {"halo": [32]}}, "window.halo: found 32 for a window of 64"),
        ({"window": {"halo": [1]}}, "window.halo: found 1 for a window of 64"),
        ({"window": {"size": "whole", "halo": [8]}}, "window.halo: a whole scene has no halo"),
        ({"window": {"size": "whole", "shape": [33]}}, "window.shape: found 33"),
        ({"input": {"spacing": [10.0]}}, "input.spacing: found [10.0]; valid: 2 sizes"),
        ({"input": {"normalisation": [{"op": "subtract", "value": [1, 2]}]}}, "valid: 1, or 4"),
        (
            {"input": {"normalisation": [{"op": "divide", "value": [0]}]}},
            "input.normalisation.0.value: found 0",
        ),
        (
            {"input": {"normalisation": [{"op": "scene_quantiles", "grid": [64]}]}},
            "input.normalisation.0.grid: found [64]; valid: 2 sizes",
        ),
        (
            {"kind": "volume", "bands": 1, "input": {"orientation": "RLS"}},
            "input.orientation: found 'RLS'; valid: one letter each",
        ),
    ],
)
def test_check_card_names_the_field(card, make_card, fields, told):
    good = {"architecture": "Unet", "arguments": {"encoder_name": "resnet18"}}
    weights = fields.get("weights", "w.safetensors")
    rest = {k: v for k, v in fields.items() if k != "weights"}
    with pytest.raises(RequestError) as error:
        check_card(make_card("smp", weights, **{**good, **rest}))
    assert str(error.value).startswith("trial: ")
    assert told in str(error.value)


def test_window_with_another_number_of_axes_is_refused_when_read(make_card):
    with pytest.raises(RequestError, match=r"window\.size: found \[64, 64, 64\]; valid: one"):
        make_card("smp", "w.pt", window={"size": [64, 64, 64]})


def test_a_card_that_passes_is_silent(card, capfd, caplog):
    assert check_card(card) is None
    assert tuple(capfd.readouterr()) == ("", "")
    assert caplog.records == []


def test_describe_counts_what_the_library_counts(card):
    module = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=3)
    facts = describe(card)
    assert facts.parameters == sum(p.numel() for p in module.parameters())
    assert facts.weights_bytes == (card.folder / "w.safetensors").stat().st_size
    assert (facts.window, facts.halo, facts.stride) == ((64, 64), (0, 0), 32)


def test_list_cards_sorts_by_file_and_tells_every_mistake(card, tmp_path):
    text = (tmp_path / "trial.yaml").read_text()
    (tmp_path / "another.yaml").write_text(text.replace("name: trial", "name: another"))
    assert [c.name for c in list_cards(tmp_path)] == ["another", "trial"]
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    (tmp_path / "worse.yaml").write_text("kind: tensor\n")
    with pytest.raises(RequestError) as error:
        list_cards(tmp_path)
    assert "bad.yaml" in str(error.value)
    assert "worse.yaml" in str(error.value)
    with pytest.raises(RequestError, match="no such folder"):
        list_cards(tmp_path / "nowhere")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_pass_the_check_and_say_what_they_are(path):
    card = load_card(path)
    if card.weights.startswith("pkg://"):
        from importlib.metadata import PackageNotFoundError, distribution

        name = card.weights.removeprefix("pkg://").partition("/")[0]
        try:
            distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"needs {name}")
    check_model(card)
    assert card.name == path.stem
    for field in ("title", "data", "scores", "limits", "licence", "source"):
        assert getattr(card, field).strip(), field


def test_the_roi_model_is_checked_with_the_card(tmp_path):
    pytest.importorskip("deepbet", reason="needs deepbet 1.0.2")
    for name in ("brain-volume", "brain-box"):
        shutil.copy(CONFIGS / f"{name}.yaml", tmp_path)
    card = load_card(tmp_path / "brain-volume.yaml")
    check_card(card)
    box = tmp_path / "brain-box.yaml"
    text = box.read_text()
    whole = "  size: whole\n  shape: [128, 128, 128]\n"
    box.write_text(text.replace(whole, "  size: [64]\n").replace("- {op: window_zscore}", ""))
    with pytest.raises(RequestError, match=r"brain-volume: roi\.card: .*window whole"):
        check_card(card)
    box.write_text(text.replace("orientation: RAS", "orientation: LPS"))
    with pytest.raises(RequestError, match=r"brain-volume: roi\.card: .*bands and orientation"):
        check_card(card)
    box.unlink()
    with pytest.raises(RequestError, match=r"brain-box\.yaml: cannot be read"):
        check_card(card)


def test_reading_cards_needs_neither_torch_nor_a_provider():
    code = (
        "import sys, segpipe.models.registry as r, segpipe.models.weights\n"
        f"r.list_cards({str(CONFIGS)!r})\n"
        "heavy = {'torch', 'monai', 'transformers', 'onnxruntime', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

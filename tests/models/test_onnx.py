"""ONNX graphs: real ones from ukis-csmask, and small ones built by hand for each layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from segpipe.config.card import load_card
from segpipe.errors import RequestError
from segpipe.models.registry import load_model, runtime_without_cuda
from segpipe.models.weights import resolve_weights

onnx = pytest.importorskip("onnx", reason="needs onnx to build small graphs")
CONFIGS = Path(__file__).parents[2] / "configs" / "models"

WEIGHT = torch.linspace(-1, 1, 3 * 4 * 3 * 3).reshape(3, 4, 3, 3)


def conv_file(path: Path, shape, *, stride=1, nhwc=False, dtype=np.float32, external=False):
    """A 3×3 convolution from 4 to 3 channels; ``shape`` is the input's, None for any size."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    axes = [n if n is not None else f"n{i}" for i, n in enumerate(shape)]
    out = [axes[0], "h", "w", 3] if nhwc else [axes[0], 3, "h", "w"]
    node = onnx.helper.make_node
    conv = node("Conv", ["x", "weight"], ["y"], pads=[1] * 4, strides=[stride] * 2)
    first, last = ("image", "x", [0, 3, 1, 2]), ("y", "scores", [0, 2, 3, 1])
    if nhwc:
        turns = [node("Transpose", [a], [b], perm=perm) for a, b, perm in (first, last)]
    else:
        turns = [node("Identity", [a], [b]) for a, b, _ in (first, last)]
    graph = onnx.helper.make_graph(
        [turns[0], conv, turns[1]],
        "conv",
        [onnx.helper.make_tensor_value_info("image", kind, axes)],
        [onnx.helper.make_tensor_value_info("scores", kind, out)],
        [onnx.numpy_helper.from_array(WEIGHT.numpy().astype(dtype), "weight")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model)
    options = {"save_as_external_data": True, "size_threshold": 0} if external else {}
    onnx.save(model, str(path), **options)


def assert_conv(model, batch: torch.Tensor) -> None:
    expected = conv2d(batch, WEIGHT, padding=1)
    assert torch.allclose(model(batch), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["cloud-6band", "cloud-4band"])
def test_cloud_cards_answer_as_the_package_session(name):
    pytest.importorskip("ukis_csmask", reason="needs ukis-csmask 1.0.0")
    card = load_card(CONFIGS / f"{name}.yaml")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        str(resolve_weights(card)), options, providers=["CPUExecutionProvider"]
    )
    batch = torch.randn(2, card.channels, 256, 256)
    expected = session.run(None, {"input": batch.numpy()})[0]
    found = load_model(card, "cpu", 2, "fp32")(batch).numpy()
    assert np.array_equal(found, expected)
    assert float(found.std()) > 0


@pytest.mark.parametrize("name", ["cloud-6band", "cloud-4band"])
def test_cloud_cards_carry_the_package_constants(name):
    """Band order, means and deviations: every digit of the JSON beside the weights."""
    pytest.importorskip("ukis_csmask", reason="needs ukis-csmask 1.0.0")
    import json

    card = load_card(CONFIGS / f"{name}.yaml")
    data = json.loads(resolve_weights(card).with_suffix(".json").read_text())["data"]
    assert card.input.bands == data["dataset_statistics"]["band_names"]
    subtract, divide = card.input.normalisation
    assert [subtract.value, divide.value] == data["dataset_statistics"]["img"]
    assert list(card.window_shape or ()) == data["target_size"]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("fixed", [None, 1, 2])
def test_any_number_of_windows_whatever_the_file_is_fixed_to(make_card, tmp_path, fixed, batch_size):
    conv_file(tmp_path / "net.onnx", (fixed, 4, None, None))
    model = load_model(make_card("onnx", "net.onnx"), "cpu", 2, "fp32")
    assert_conv(model, torch.randn(batch_size, 4, 32, 48))


def test_channels_last_layout(make_card, tmp_path):
    conv_file(tmp_path / "net.onnx", (None, None, None, 4), nhwc=True)
    card = make_card("onnx", "net.onnx", arguments={"layout": "nhwc", "input": "image"})
    assert_conv(load_model(card, "cpu", 2, "fp32"), torch.randn(2, 4, 32, 48))


def test_half_precision_file_takes_and_gives_float32(make_card, tmp_path):
    conv_file(tmp_path / "net.onnx", (None, 4, None, None), dtype=np.float16)
    batch = torch.randn(1, 4, 32, 32)
    found = load_model(make_card("onnx", "net.onnx"), "cpu", 2, "fp32")(batch)
    assert found.dtype == torch.float32
    assert torch.allclose(found, conv2d(batch, WEIGHT, padding=1), atol=0.05)


def test_lower_resolution_is_upsampled_by_half_pixels(make_card, tmp_path):
    conv_file(tmp_path / "net.onnx", (None, 4, None, None), stride=4)
    batch = torch.randn(1, 4, 64, 32)
    small = conv2d(batch, WEIGHT, padding=1, stride=4)
    expected = interpolate(small, size=(64, 32), mode="bilinear", align_corners=False)
    found = load_model(make_card("onnx", "net.onnx"), "cpu", 2, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_network_that_answers_for_a_smaller_area_is_refused(make_card, tmp_path):
    """A valid convolution gives 62 of 64: stretching it would move every pixel."""
    net = torch.nn.Conv2d(4, 3, 3)
    torch.jit.script(net).save(str(tmp_path / "net.pt"))
    card = make_card("torchscript", "net.pt", allow_torchscript=True)
    with pytest.raises(RequestError, match=r"window\.size: a window of \(64, 64\) is answered"):
        load_model(card, "cpu", 2, "fp32")(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(
    ("shape", "fields", "told"),
    [
        ((None, 4, None, None), {"bands": 6}, "input.bands: found 6; the file takes 4"),
        ((None, 4, None, None), {"classes": 4}, "classes: the card needs 4"),
        ((None, 4, 64, 64), {}, "window: the file takes [64, 64] only"),
        ((None, 4, 32, 32), {"window": {"fixed": True}}, "window: the file takes [32, 32] only"),
        ((None, 4, None, None), {"kind": "volume"}, "kind: a volume model takes 5 axes"),
        ((None, 4, None, None), {"arguments": {"layuot": "nhwc"}}, "arguments.layuot: unknown"),
        ((None, 4, None, None), {"arguments": {"layout": "hwc"}}, "arguments.layout: found 'hwc'"),
        ((None, 4, None, None), {"arguments": {"input": "img"}}, "the file has: image"),
        ((None, 4, None, None), {"arguments": {"output": "y"}}, "the file has: scores"),
    ],
)
def test_mistakes_name_the_field(make_card, tmp_path, shape, fields, told):
    conv_file(tmp_path / "net.onnx", shape)
    with pytest.raises(RequestError) as error:
        load_model(make_card("onnx", "net.onnx", **fields), "cpu", 2, "fp32")
    assert str(error.value).startswith("trial: ")
    assert told in str(error.value)


def test_damaged_file_is_refused(make_card, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(RequestError, match=r"weights: .*cannot be loaded by onnxruntime"):
        load_model(make_card("onnx", "net.onnx"), "cpu", 2, "fp32")


def test_weights_outside_the_file_are_refused(make_card, tmp_path):
    """They would not be part of the fingerprint."""
    conv_file(tmp_path / "net.onnx", (None, 4, None, None), external=True)
    with pytest.raises(RequestError, match="without external data"):
        load_model(make_card("onnx", "net.onnx"), "cpu", 2, "fp32")


def test_onnxruntime_without_cuda_is_told_and_torch_is_asked_of_no_adapter(make_card):
    there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    told = runtime_without_cuda(make_card("onnx", "net.onnx"))
    assert told == ("" if there else f"onnxruntime {onnxruntime.__version__} (onnxruntime-gpu would)")
    assert runtime_without_cuda(make_card("smp", "w.pt")) == ""

"""Models in another form: ONNX against the network itself, int8 against onnxruntime's arithmetic."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors.torch import save_file

from segpipe.config.card import load_card
from segpipe.config.job import Job
from segpipe.convert.command import judge, scene_windows
from segpipe.convert.onnx_file import check_graph, export_onnx, onnx_graph, quantise
from segpipe.convert.parity import Parity, compare, milliseconds, noise_windows
from segpipe.errors import RequestError
from segpipe.models import registry
from segpipe.models.network import compiled
from segpipe.models.registry import load_model
from segpipe.models.trainable import untrained

onnx = pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxscript", reason="needs onnxscript, with which torch writes ONNX")

UNET = {"channels": [4, 8], "strides": [2], "norm": "batch"}
STEPS = [{"op": "subtract", "value": [100]}, {"op": "divide", "value": [50]}]


@pytest.fixture
def unet(make_card, tmp_path):
    """A small MONAI U-Net with random weights and trained-looking batch norms."""

    def make(kind: str = "raster", bands: int = 2, **fields):
        fields.setdefault("input", {"normalisation": STEPS})
        fields.setdefault("window", {"size": [32], "stride": 2, "halo": [4]})
        arguments = {"spatial_dims": 2 if kind == "raster" else 3, **UNET}
        card = make_card(
            "monai",
            "net.safetensors",
            kind=kind,
            bands=bands,
            architecture="UNet",
            arguments=arguments,
            **fields,
        )
        network = untrained(card)
        for module in network.modules():
            if hasattr(module, "running_var") and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        save_file(network.state_dict(), tmp_path / "net.safetensors")
        return card, network.eval()

    return make


def conv_card(make_card, tmp_path, weight: np.ndarray):
    """An ONNX card of one 1×1 convolution, (k, c, 1, 1), without activation."""
    node = onnx.helper.make_node("Conv", ["image", "weight"], ["scores"])
    value = onnx.helper.make_tensor_value_info
    k, c = weight.shape[:2]
    graph = onnx.helper.make_graph(
        [node],
        "conv",
        [value("image", onnx.TensorProto.FLOAT, ["n", c, "y", "x"])],
        [value("scores", onnx.TensorProto.FLOAT, ["n", k, "y", "x"])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "conv.onnx"))
    return make_card("onnx", "conv.onnx", bands=c, classes=k, output={"activation": "none"})


@pytest.fixture
def scene(tmp_path):
    """A 100×90 raster of two bands; the reference of its eastern half holds classes 0 and 1."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 200, (2, 100, 90)).astype(np.uint8)
    truth = rng.integers(0, 2, (100, 90)).astype(np.uint8)
    truth[:, :45] = 255
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5.2e6)}
    for name, values in (("scene", image), ("truth", truth[None])):
        profile = {
            "driver": "GTiff",
            "width": 90,
            "height": 100,
            "count": len(values),
            "dtype": "uint8",
            **place,
        }
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as target:
            target.write(values)
    job = Job.model_validate(
        {
            "name": "trial",
            "scenes": [str(tmp_path / "scene.tif")],
            "bands": ["b0", "b1"],
            "model": "other.yaml",
            "reference": {"path": str(tmp_path / "truth.tif"), "values": {255: None}},
        }
    )
    return job, image, truth


@pytest.mark.parametrize(("kind", "sizes"), [("raster", (64, 18)), ("volume", (16, 8, 10))])
def test_onnx_answers_as_the_network_at_any_size_and_batch(unet, tmp_path, kind, sizes):
    card, network = unet(kind, window={"size": [16], "stride": 2, "halo": [4]})
    made = load_card(export_onnx(card, tmp_path / "out"))
    batch = torch.randn(3, 2, *sizes)
    with torch.inference_mode():
        expected = network(batch)
    found = load_model(made, "cpu", 1, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (made.input, made.window, made.classes) == (card.input, card.window, card.classes)
    assert made.name == "trial-onnx"
    [changed] = re.findall(r"(\d+) of [\d,]+ elements change class", made.scores)
    assert int(changed) <= 2  # whose classes are alike but for rounding
    assert b"site-packages" not in (tmp_path / "out" / made.weights).read_bytes()


def test_a_file_that_answers_otherwise_is_refused(unet):
    card, _ = unet()
    graph, open_space = onnx_graph(card)
    for tensor in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
    with pytest.raises(RequestError, match=r"answers otherwise than the network: [\d,]+ of 4,096 elements"):
        check_graph(card, graph, open_space, noise_windows(card))


def test_parity_counts_elements_and_keeps_nan(make_card):
    card = make_card("onnx", "none.onnx", output={"activation": "none"})
    first = torch.zeros(1, 3, 4, 8)
    first[:, 0], first[:, 1] = 0.6, 0.4
    second = first.clone()
    second[0, 1, 0, :3] = 0.9  # three elements change class by 0.5
    windows = [torch.zeros(4, 4, 8)] * 2
    assert compare(card, lambda x: first, lambda x: second, windows) == Parity(64, 6, pytest.approx(0.5))
    second[0, 2, 3, 3] = torch.nan
    assert np.isnan(compare(card, lambda x: first, lambda x: second, windows).largest)


def test_time_is_each_models_own():
    import time

    slow, fast = milliseconds([lambda x: time.sleep(0.02), lambda x: time.sleep(0.002)], torch.zeros(1, 1), 3)
    assert slow >= 20
    assert 2 <= fast < slow


def test_static_int8_is_within_the_rounding_of_its_steps(make_card, tmp_path):
    """Steps by ONNX's definition of linear quantisation: a range over 255, a weight's largest over 127."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4, 1, 1)).astype(np.float32) * np.float32([1, 10, 100]).reshape(3, 1, 1, 1)
    card = conv_card(make_card, tmp_path, weight)
    windows = [torch.from_numpy(rng.uniform(-2, 2, (4, 16, 16)).astype(np.float32)) for _ in range(4)]
    made = load_card(quantise(card, tmp_path / "out", "static", windows))
    graph = onnx.load(str(tmp_path / "out" / made.weights)).graph
    whole = [t for t in map(onnx.numpy_helper.to_array, graph.initializer) if t.shape == weight.shape]
    assert [t.dtype for t in whole] == [np.int8]
    step = np.abs(weight).max(axis=(1, 2, 3)) / 127  # of each output channel
    assert np.abs(whole[0] * step.reshape(3, 1, 1, 1) - weight).max() <= 0.5001 * step.max()
    x = torch.stack(windows).numpy()
    expected = np.einsum("kc,ncyx->nkyx", weight[:, :, 0, 0], x)
    found = load_model(made, "cpu", 1, "fp32")(torch.from_numpy(x)).numpy()
    steps_in, steps_out = np.ptp(x) / 255, np.ptp(expected) / 255
    reach = np.abs(weight).sum(axis=(1, 2, 3)) * steps_in / 2 + 4 * np.abs(x).max() * step / 2 + steps_out
    error = np.abs(found - expected).max(axis=(0, 2, 3))
    assert (error <= reach).all()
    assert error.max() > 1e-4  # it was quantised
    assert "In int8 (static)" in made.scores


def test_dynamic_int8_answers_nearly_the_same(make_card, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4, 1, 1)).astype(np.float32)
    card = conv_card(make_card, tmp_path, weight)
    made = load_card(quantise(card, tmp_path / "out", "dynamic"))
    graph = onnx.load(str(tmp_path / "out" / made.weights)).graph
    assert "ConvInteger" in {node.op_type for node in graph.node}
    x = rng.normal(size=(1, 4, 16, 16)).astype(np.float32)
    expected = np.einsum("kc,ncyx->nkyx", weight[:, :, 0, 0], x)
    found = load_model(made, "cpu", 1, "fp32")(torch.from_numpy(x)).numpy()
    step, step_in = np.ptp(np.append(weight, 0)) / 255, np.ptp(x) / 255
    reach = np.abs(weight).sum(axis=(1, 2, 3)).max() * step_in + np.abs(x).sum(1).max() * step
    assert 1e-5 < np.abs(found - expected).max() <= reach


def test_scores_are_those_of_the_confusion_matrix(unet, scene):
    from sklearn.metrics import accuracy_score, jaccard_score

    card, _ = unet()
    job, image, truth = scene

    class Threshold:
        """House where the first band is over 100, ground elsewhere: what the network would see as 0."""

        device = torch.device("cpu")

        def __call__(self, batch: torch.Tensor) -> torch.Tensor:
            house = (batch[:, :1] > 0).float()
            return 10 * torch.cat([1 - house, house, torch.zeros_like(house)], 1)

    found = judge(job, card.folder / "trial.yaml", Threshold())
    labels, known = (image[0] > 100).astype(int)[truth != 255], truth[truth != 255]
    assert found.accuracy == pytest.approx(accuracy_score(known, labels), abs=1e-12)
    house = jaccard_score(known, labels, pos_label=1)
    assert found.iou["house"] == pytest.approx(house, abs=1e-12)
    assert np.isnan(found.iou["water"])  # in neither
    assert found.miou == found.iou["house"]  # ground is background


def test_windows_of_a_scene_are_its_normalised_pixels(unet, scene):
    card, _ = unet(window={"size": [32], "stride": 2, "halo": [0]})
    job, image, _ = scene
    windows = scene_windows(job, card.folder / "trial.yaml", 5)
    normal = (image.astype(np.float32) - 100) / 50
    assert len(windows) == 5
    assert np.array_equal(windows[0].numpy(), normal[:, :32, :32])


def test_command_writes_a_card_that_runs_and_tells_both_scores(unet, scene, tmp_path, capsys):
    from segpipe.cli.main import execute

    card, _ = unet()
    job, _, _ = scene
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)))
    path, out = str(card.folder / "trial.yaml"), tmp_path / "out"
    assert execute(["models", "export", path, "--to", "int8", "--out", str(out), "--job", str(file)]) == 0
    printed = capsys.readouterr().out
    made = load_card(out / "trial-int8.yaml")
    assert "ratio" in printed
    before, after = (judge(job, p) for p in (path, out / "trial-int8.yaml"))
    assert made.scores.endswith(f"On trial: {before} before; {after} after.")
    assert execute(["models", "export", path, "--to", "int4", "--out", str(out)]) == 2
    assert "--to: found 'int4'; valid: onnx, int8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_an_execution_that_is_not_installed_is_refused(make_card, tmp_path, name):
    import onnxruntime

    card = conv_card(make_card, tmp_path, np.ones((3, 4, 1, 1), np.float32))
    card = card.model_copy(update={"arguments": {"execution": name}})
    if any(name in p.lower() for p in onnxruntime.get_available_providers()):
        pytest.skip(f"onnxruntime has {name} here")
    with pytest.raises(
        RequestError, match=f"execution: found '{name}', which onnxruntime .* lacks here; install"
    ):
        registry.check_card(card)


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_network_answers_as_the_plain_one(unet):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    card, network = unet(window={"size": [16], "stride": 2, "halo": [4]})
    plain = registry.build_network(card, torch.device("cpu"), 1)
    batch = torch.randn(1, 2, 16, 16)
    with torch.inference_mode():
        found = compiled(card, plain)(batch)
        assert torch.allclose(found, network(batch), atol=1e-5)


def test_what_cannot_be_compiled_is_refused(unet, make_card, tmp_path, monkeypatch):
    card, _ = unet()
    plain = registry.build_network(card, torch.device("cpu"), 1)
    whole = card.model_copy(update={"window": card.window.model_copy(update={"size": "whole"})})
    with pytest.raises(RequestError, match="takes whole scenes of any shape; use compile: false"):
        compiled(whole, plain)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"no C\+\+ compiler here"):
        compiled(card, plain)
    file = conv_card(make_card, tmp_path, np.ones((3, 4, 1, 1), np.float32))
    with pytest.raises(RequestError, match=r"trial \(onnx\) is no PyTorch network"):
        compiled(file, registry.build_network(file, torch.device("cpu"), 1))
    with pytest.raises(RequestError, match="onnx is no PyTorch network: nothing to export"):
        export_onnx(file, tmp_path / "out")

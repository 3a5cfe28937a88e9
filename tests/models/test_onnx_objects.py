"""ONNX networks that answer with objects, decoded as the published formula, element by element."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from segpipe.config.card import Card, load_card
from segpipe.errors import RequestError
from segpipe.models.providers.onnx import build
from segpipe.models.registry import check_card, load_object_model

onnx = pytest.importorskip("onnx", reason="needs onnx to build small graphs")

CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 5, "name": "car", "color": "#ff0000"},
    {"value": 8, "name": "boat", "color": "#0000ff"},
]
WINDOW = 64
PROTOTYPES = 4
ANCHORS = 60


def save_constants(path: Path, outputs: dict[str, np.ndarray], channels: int = 2) -> None:
    """A graph whose outputs are constants plus 0 × the sum of its input: what a network would answer."""
    node, tensors, nodes, infos = onnx.helper.make_node, [], [], []
    nodes += [node("ReduceSum", ["image"], ["sum"], keepdims=0), node("Mul", ["sum", "zero"], ["nothing"])]
    tensors.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    for name, values in outputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensors.append(onnx.numpy_helper.from_array(values, f"{name}_stored"))
        nodes.append(node("Cast", ["nothing"], [f"{name}_zero"], to=kind))
        nodes.append(node("Add", [f"{name}_stored", f"{name}_zero"], [name]))
        infos.append(onnx.helper.make_tensor_value_info(name, kind, list(values.shape)))
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", channels, "h", "w"])
    graph = onnx.helper.make_graph(nodes, "objects", [image], infos, tensors)
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))


@pytest.fixture
def card(tmp_path):
    """``card(**fields)``: an instance card with two classes and background."""

    def make(**fields) -> Card:
        data = {
            "name": "trial",
            "kind": "raster",
            "provider": "onnx",
            "weights": "net.onnx",
            "arguments": {"decode": "masks"},
            "input": {"bands": ["a", "b"]},
            "window": {"size": [WINDOW], "halo": [16]},
            "output": {"kind": "instance", "score": 0.3, "overlap": 0.0},
            "classes": CLASSES,
            **fields,
        }
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(data))
        return load_card(tmp_path / "trial.yaml")

    return make


def yolo_answer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (4 + 2 + c, anchors) and prototypes (c, 16, 16) of overlapping boxes with distinct scores."""
    rng = np.random.default_rng(seed)
    centres = rng.choice([16.0, 40.0, 50.0], (2, ANCHORS)) + rng.uniform(-3, 3, (2, ANCHORS))
    sizes = rng.uniform(12, 26, (2, ANCHORS))
    scores = rng.permutation(2 * ANCHORS).reshape(2, ANCHORS) / (2 * ANCHORS)
    coefficients = rng.normal(size=(PROTOTYPES, ANCHORS))
    rows = np.concatenate([centres, sizes, scores, coefficients]).astype(np.float32)
    return rows, rng.normal(size=(PROTOTYPES, 16, 16)).astype(np.float32)


def published(rows: np.ndarray, prototypes: np.ndarray, score: float, iou: float, most: int):
    """Ultralytics 8.0's non_max_suppression and process_mask, one box and one element at a time.

    Returns:
        masks (n, 64, 64) of probabilities before the threshold, class numbers, scores; highest score first.
    """
    found = []
    for anchor in rows.T:
        x, y, w, h = anchor[:4]
        best = int(anchor[4:6].argmax())
        if anchor[4 + best] > score:
            found.append((anchor[4 + best], best, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), anchor[6:]))
    found.sort(key=lambda f: -f[0])
    kept: list = []
    for candidate in found:
        if all(candidate[1] != k[1] or overlap(candidate[2], k[2]) <= iou for k in kept):
            kept.append(candidate)
    masks = []
    for _, _, (x0, y0, x1, y1), weights in kept[:most]:
        small = torch.zeros(16, 16)
        for row in range(16):
            for column in range(16):
                if x0 / 4 <= column < x1 / 4 and y0 / 4 <= row < y1 / 4:
                    mixed = float((weights * prototypes[:, row, column]).sum())
                    small[row, column] = 1 / (1 + math.exp(-mixed))
        masks.append(torch.nn.functional.interpolate(small[None, None], (64, 64), mode="bilinear")[0, 0])
    kept = kept[:most]
    return torch.stack(masks).numpy(), [k[1] for k in kept], [k[0] for k in kept]


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@pytest.mark.parametrize(("iou", "most"), [(0.7, 300), (0.3, 300), (0.5, 6)])
def test_yolo_equals_the_published_formula(card, tmp_path, iou, most):
    rows, prototypes = yolo_answer(3)
    save_constants(tmp_path / "net.onnx", {"output0": rows[None], "output1": prototypes[None]})
    arguments = {"decode": "yolo-seg", "iou": iou, "detections": most}
    given = card(arguments=arguments)
    check_card(given)
    (found,) = build(given, torch.device("cpu"), 1).candidates(torch.zeros(1, 2, WINDOW, WINDOW))
    masks, classes, scores = published(rows, prototypes, 0.3, iou, most)
    assert len(masks) >= 6
    assert found.classes.tolist() == [(5, 8)[c] for c in classes]
    assert np.allclose(found.scores, scores)
    assert np.allclose(found.masks, masks, atol=1e-5)


def test_yolo_objects_of_a_window_do_not_overlap(card, tmp_path):
    rows, prototypes = yolo_answer(4)
    save_constants(tmp_path / "net.onnx", {"output0": rows[None], "output1": prototypes[None]})
    model = load_object_model(card(arguments={"decode": "yolo-seg", "iou": 0.3}), "cpu", 1, "fp32")
    both = model.objects(torch.randn(2, 2, WINDOW, WINDOW))
    masks, classes, _ = published(rows, prototypes, 0.3, 0.3, 300)
    expected = np.zeros((WINDOW, WINDOW), int)
    for number, mask in enumerate(masks, 1):  # highest score first
        expected[(mask > 0.5) & (expected == 0)] = number
    for window in both:
        assert np.array_equal(window.ids > 0, expected > 0)
        pairs = set(zip(window.ids[expected > 0].tolist(), expected[expected > 0].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # the same up to names
        for own, theirs in pairs:
            assert window.classes[own - 1] == (5, 8)[classes[theirs - 1]]


def squares() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two masks of 16 × 16 (a quarter of the window), their class numbers and scores."""
    masks = np.full((2, 16, 16), -4, np.float32)
    masks[0, 2:8, 2:8] = 4
    masks[1, 6:14, 6:14] = 2
    return masks, np.array([2, 1]), np.array([0.9, 0.6], np.float32)


@pytest.mark.parametrize("shape", ["n", "n1", "1n"])
def test_masks_are_upsampled_and_named(card, tmp_path, shape):
    masks, classes, scores = squares()
    stored = {"n": masks, "n1": masks[:, None], "1n": masks[None]}[shape]
    save_constants(tmp_path / "net.onnx", {"scores": scores, "masks": stored, "classes": classes})
    given = card(arguments={"decode": "masks", "logits": True})
    check_card(given)
    (found,) = load_object_model(given, "cpu", 1, "fp32").objects(torch.zeros(1, 2, WINDOW, WINDOW))
    large = torch.nn.functional.interpolate(torch.from_numpy(masks)[None], (64, 64), mode="bilinear")[0] > 0
    expected = np.where(large[0], 8, np.where(large[1], 5, 0))
    value = np.array([0, *found.classes])
    assert np.array_equal(value[found.ids], expected)
    assert sorted(found.scores.tolist()) == pytest.approx([0.6, 0.9])


def test_no_objects(card, tmp_path):
    empty = {"masks": np.zeros((0, 16, 16), np.float32), "scores": np.zeros(0, np.float32)}
    save_constants(tmp_path / "net.onnx", {**empty, "classes": np.zeros(0, np.int64)})
    (found,) = load_object_model(card(), "cpu", 1, "fp32").objects(torch.zeros(1, 2, WINDOW, WINDOW))
    assert found.ids.shape == (WINDOW, WINDOW)
    assert not found.ids.any()
    rows, prototypes = yolo_answer(3)
    rows[4:6] = 0
    save_constants(tmp_path / "net.onnx", {"output0": rows[None], "output1": prototypes[None]})
    given = card(arguments={"decode": "yolo-seg"})
    (found,) = load_object_model(given, "cpu", 1, "fp32").objects(torch.zeros(1, 2, WINDOW, WINDOW))
    assert not found.ids.any()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"arguments": {}}, "arguments.decode: found None; valid: masks or yolo-seg"),
        ({"arguments": {"decode": "masks", "iou": 0.5}}, "arguments.iou: unknown"),
        ({"arguments": {"decode": "yolo-seg", "iou": 0}}, "arguments.iou: found 0"),
        ({"arguments": {"decode": "yolo-seg", "detections": 0}}, "arguments.detections: found 0"),
        ({"arguments": {"decode": "masks", "logits": 1}}, "arguments.logits: found 1"),
        (
            {"output": {"kind": "panoptic"}, "arguments": {"decode": "yolo-seg"}},
            "output.kind: found panoptic; valid for yolo-seg: instance",
        ),
        ({"arguments": {"decode": "yolo-seg"}}, "weights: the file's outputs are"),
        ({"input": {"bands": ["a"]}}, "input.bands: found 1; the file takes 2"),
    ],
)
def test_mistakes_name_the_field(card, tmp_path, fields, told):
    masks, classes, scores = squares()
    save_constants(tmp_path / "net.onnx", {"masks": masks, "classes": classes, "scores": scores})
    with pytest.raises(RequestError) as error:
        load_object_model(card(**fields), "cpu", 1, "fp32")
    assert told in str(error.value)


def test_files_that_do_not_fit_the_card_are_refused(card, tmp_path):
    masks, classes, scores = squares()
    save_constants(tmp_path / "net.onnx", {"masks": masks, "labels": classes, "scores": scores})
    with pytest.raises(
        RequestError, match="outputs are masks, labels, scores; valid: masks, classes, scores"
    ):
        load_object_model(card(), "cpu", 1, "fp32")
    save_constants(tmp_path / "net.onnx", {"masks": masks, "classes": classes + 1, "scores": scores})
    model = load_object_model(card(), "cpu", 1, "fp32")
    with pytest.raises(RequestError, match=r"classes: the file says \[2, 3\]; valid: 0 to 2"):
        model.objects(torch.zeros(1, 2, WINDOW, WINDOW))
    rows, prototypes = yolo_answer(3)
    save_constants(tmp_path / "net.onnx", {"output0": rows[None, 1:], "output1": prototypes[None]})
    with pytest.raises(RequestError, match="classes: the card has 2 beside background; the file 1"):
        load_object_model(card(arguments={"decode": "yolo-seg"}), "cpu", 1, "fp32")

"""Detectors with tiny random networks: boxes, scores and phrases are those of the library's own processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library
from safetensors.torch import load_file, save_file
from skimage.measure import label, regionprops

from segpipe.errors import RequestError
from segpipe.prompts.detectors import ClipSeg, load_detector
from segpipe.prompts.grounders import Outcome

CPU = torch.device("cpu")
PHRASES = ["lake", "small docks", "field"]
WINDOW = np.random.default_rng(0).random((3, 64, 96)).astype(np.float32)


def _bert(folder: Path) -> Any:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "lake",
        "dock",
        "field",
        "small",
        "##s",
        "?",
        ",",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    return library.BertTokenizer(str(folder / "vocab.txt"))


def _clip(folder: Path, length: int) -> Any:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    entries = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(["!", *entries])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return library.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length, pad_token="!"
    )


def _dino(folder: Path, prefix: str) -> Any:
    config = getattr(library, f"{prefix}Config")(
        backbone_config=library.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
            image_size=64,
        ),
        text_config=library.BertConfig(
            vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=40,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=24,
    )
    image = library.GroundingDinoImageProcessor(size={"shortest_edge": 80, "longest_edge": 140})
    network = getattr(library, f"{prefix}ForObjectDetection")(config)
    return network, library.GroundingDinoProcessor(image, _bert(folder))


def _owl(folder: Path) -> Any:
    words = _clip(folder, 16)
    config = library.Owlv2Config(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    image = library.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return library.Owlv2ForObjectDetection(config), library.Owlv2Processor(image, words)


def _clipseg(folder: Path) -> Any:
    words = _clip(folder, 20)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = library.CLIPSegConfig(
        text_config=dict(
            **sizes,
            vocab_size=len(words),
            max_position_embeddings=20,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        ),
        vision_config=dict(**sizes, image_size=32, patch_size=8),
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    image = library.ViTImageProcessor(size={"height": 32, "width": 32})
    return library.CLIPSegForImageSegmentation(config), library.CLIPSegProcessor(image, words)


def _save(folder: Path, make: Any, *arguments: str, factor: float = 3) -> tuple[Any, Any]:
    torch.manual_seed(1)
    folder.mkdir()
    network, processor = make(folder, *arguments)
    # Networks begin with logits near 0: larger numbers tell queries and words apart.
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim > 1 and "embed" not in name:
                tensor.mul_(factor)
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return network, processor


@pytest.fixture(scope="module", params=["GroundingDino", "MMGroundingDino"])
def dino(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("models") / request.param
    return folder, *_save(folder, _dino, request.param)


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(torch.quantile(values.double().flatten(), share))


def test_boxes_and_phrases_of_grounding_dino(dino: tuple[Path, Any, Any]) -> None:
    folder, network, processor = dino
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = network(**batch)
    words = torch.sigmoid(output.logits[0])
    box_threshold = _quantile(words.max(dim=-1).values, 0.5)
    text_threshold = _quantile(words.max(dim=-1).values, 0.3)
    expected = processor.post_process_grounded_object_detection(
        output,
        batch["input_ids"],
        threshold=box_threshold,
        text_threshold=text_threshold,
        target_sizes=[WINDOW.shape[1:]],
    )[0]
    found = load_detector(folder, CPU, box_threshold, text_threshold).ground(WINDOW, PHRASES)
    # lake . small dock s . field .  behind [CLS]
    spans = {0: [1], 1: [3, 4, 5], 2: [7]}
    best = torch.stack([words[:, at].max(dim=1).values for at in spans.values()], dim=1)
    over = words.max(dim=-1).values > box_threshold
    named = (best.max(dim=1).values > text_threshold)[over].numpy()
    d = found.detections
    assert 0 < len(d) == named.sum() <= len(named)
    got = np.column_stack((d.start[:, ::-1], d.stop[:, ::-1])) + 0.5
    np.testing.assert_allclose(got, expected["boxes"].numpy()[named], atol=1e-3)
    np.testing.assert_allclose(d.score, expected["scores"].numpy()[named], atol=1e-5)
    assert d.label == tuple(t for t, keep in zip(expected["text_labels"], named, strict=True) if keep)
    np.testing.assert_array_equal(d.phrase, best.argmax(dim=1)[over].numpy()[named])
    assert sum(a.found + a.below for a in found.accounts) == 40, "every candidate is accounted for"
    assert [a.found for a in found.accounts] == np.bincount(d.phrase, minlength=3).tolist()


def test_nothing_over_the_threshold_is_said_with_the_best(dino: tuple[Path, Any, Any]) -> None:
    folder, *_ = dino
    found = load_detector(folder, CPU, box_threshold=1.0).ground(WINDOW, PHRASES)
    assert not len(found.detections) and found.detections.start.shape == (0, 2)
    assert {a.outcome for a in found.accounts} <= {Outcome.below, Outcome.absent}
    assert sum(a.below for a in found.accounts) == 40
    assert max(a.best for a in found.accounts if a.below) <= 1


def test_phrases_that_grounding_dino_cannot_take(dino: tuple[Path, Any, Any]) -> None:
    detector = load_detector(dino[0], CPU)
    with pytest.raises(RequestError, match="found a full stop"):
        detector.ground(WINDOW, ["lake. dock"])
    with pytest.raises(RequestError, match="valid: at most 24 together"):
        detector.ground(WINDOW, ["lake"] * 20)
    with pytest.raises(RequestError, match=r"found shape \(5, 8, 8\); valid: \(3, y, x\)"):
        detector.ground(np.zeros((5, 8, 8), np.float32), ["lake"])


def test_boxes_and_phrases_of_owl(tmp_path: Path) -> None:
    network, processor = _save(tmp_path / "owl", _owl)
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = network(**batch)
    threshold = _quantile(torch.sigmoid(output.logits).max(dim=-1).values, 0.7)
    expected = processor.post_process_grounded_object_detection(
        output, threshold=threshold, target_sizes=[WINDOW.shape[1:]], text_labels=[PHRASES]
    )[0]
    found = load_detector(tmp_path / "owl", CPU, threshold).ground(WINDOW, PHRASES)
    d = found.detections
    assert len(d) > 5 and len(set(expected["text_labels"])) > 1
    got = np.column_stack((d.start[:, ::-1], d.stop[:, ::-1])) + 0.5
    np.testing.assert_allclose(got, expected["boxes"].numpy(), atol=1e-3)
    np.testing.assert_allclose(d.score, expected["scores"].numpy(), atol=1e-5)
    assert d.label == tuple(expected["text_labels"])
    assert [PHRASES[i] for i in d.phrase] == expected["text_labels"]
    assert sum(a.found + a.below for a in found.accounts) == 64, "a candidate for each 8-pixel patch"
    with pytest.raises(RequestError, match="valid: at most 16"):
        load_detector(tmp_path / "owl", CPU).ground(WINDOW, ["a very long phrase about lakes"])


def test_score_maps_and_objects_of_clipseg(tmp_path: Path) -> None:
    network, processor = _save(tmp_path / "clipseg", _clipseg, factor=1)
    batch = processor(text=PHRASES, images=[WINDOW] * 3, do_rescale=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**batch).logits
    expected = torch.nn.functional.interpolate(
        torch.sigmoid(logits)[:, None], size=(64, 96), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    detector = load_detector(tmp_path / "clipseg", CPU)
    assert isinstance(detector, ClipSeg)
    maps = detector.score_maps(WINDOW, PHRASES)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert maps.std() > 0.01 and maps.max() < 1
    threshold = float(np.quantile(maps, 0.6))
    found = load_detector(tmp_path / "clipseg", CPU, threshold).ground(WINDOW, PHRASES)
    d = found.detections
    for i, scores in enumerate(maps):
        objects = regionprops(label(scores >= threshold, connectivity=2), intensity_image=scores)
        mine = d.phrase == i
        assert found.accounts[i].found == len(objects) == mine.sum()
        expected_rows = sorted((*np.subtract(o.bbox, 0.5), o.intensity_mean) for o in objects)
        got = sorted(zip(*d.start[mine].T, *d.stop[mine].T, d.score[mine], strict=True))
        np.testing.assert_allclose(np.array(got), np.array(expected_rows), atol=1e-5)
        for y, x in d.point[mine].astype(int):
            assert scores[y, x] >= threshold
    nothing = load_detector(tmp_path / "clipseg", CPU, 1.0).ground(WINDOW, ["lake"])
    assert nothing.accounts[0].outcome is Outcome.absent
    assert nothing.accounts[0].best == pytest.approx(float(maps[0].max()))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dino"
    _save(folder, _dino, "GroundingDino")
    config, good = folder / "config.json", json.loads((folder / "config.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(RequestError, match=match):
            load_detector(folder, CPU)

    config.write_text(json.dumps({**good, "model_type": "detr"}))
    refused("model_type is 'detr'; valid for text: grounding-dino")
    config.write_text(json.dumps({**good, "backbone_config": None, "backbone": "resnet50"}))
    refused("backbone_config: found 'resnet50'")
    config.write_text(json.dumps({**good, "auto_map": {"AutoModel": "evil.Model"}}))
    load_detector(folder, CPU)
    config.write_text("{")
    refused("not readable as JSON")
    config.write_text(json.dumps(good))
    tensors = load_file(folder / "model.safetensors")
    name = min(n for n in tensors if n.endswith("weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    refused(f"missing keys: {name}")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "processor_config.json").unlink()
    refused("no processor")
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink()
    refused("found no tokenizer.json; valid: it, or vocab.txt")

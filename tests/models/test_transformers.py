"""transformers: scores and objects are those of the library's networks and of its image processors."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from segpipe.errors import RequestError
from segpipe.models.card import Provider
from segpipe.models.objects import ReadyObjects
from segpipe.models.registry import check_card, load_model, untrained
from segpipe.models.transformers import build
from segpipe.models.weights import ENDINGS

sys.path.insert(0, str(Path(__file__).parent))
from tiny_transformers import CONFIGS, tiny

CPU = torch.device("cpu")
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


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share; two threads on a busy machine wait for each other."""
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - set(QUERIES)))
def test_logits_equal_the_library_upsampled(make_card, tmp_path, architecture):
    direct = saved(tmp_path, architecture)
    batch = torch.randn(1, 4, 64, 64)
    logits = answer(direct, batch).logits
    expected = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    found = load_model(card_for(make_card, architecture), "cpu", 1, "fp32")(batch)
    # Tensors mapped from a file lie elsewhere in memory, which can change the order of sums.
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
    assert float(found.std()) > 0.1


@pytest.mark.parametrize("architecture", QUERIES)
def test_class_scores_are_the_processors(make_card, tmp_path, architecture):
    """Mask2Former's processor knows windows of 384 alone, others are asked for their own size."""
    torch.manual_seed(SEEDS[architecture][0])
    direct = saved(tmp_path, architecture)
    edge = 384 if architecture.startswith("Mask2") else 64
    batch = torch.randn(1, 4, edge, edge)
    [expected] = PROCESSORS[architecture]().post_process_semantic_segmentation(
        answer(direct, batch), target_sizes=[(edge, edge)], return_segmentation_scores=True
    )
    found = load_model(card_for(make_card, architecture), "cpu", 1, "fp32")(batch)[0]
    assert torch.allclose(found, expected.segmentation_scores, atol=1e-5)
    assert torch.equal(found.argmax(0), expected.segmentation)
    assert float(found.std()) > 0.01
    assert len(expected.segmentation.unique()) > 1 or architecture.startswith("Detr")


def assert_same_segments(found, segmentation, infos):
    """The same elements, class and score, whatever the ids are."""
    assert len(found.classes) == len(infos)
    taken = np.zeros(segmentation.shape, bool)
    for info in infos:
        here = segmentation == info["id"]
        [k] = np.unique(found.ids[here])
        assert k > 0 and np.array_equal(found.ids == k, here)
        assert found.classes[k - 1] == info["label_id"] + 1  # the fixture's values, after background
        assert found.scores[k - 1] == pytest.approx(info["score"], abs=2e-6)
        taken |= here
    assert not found.ids[~taken].any()


@pytest.mark.parametrize("architecture", QUERIES)
def test_panoptic_segments_are_the_processors(make_card, tmp_path, architecture):
    """All classes are things: transformers 5 mixes up ids after stuff (tests/instances/test_window.py)."""
    edge = 384 if architecture.startswith("Mask2") else 64
    for seed in SEEDS[architecture]:
        torch.manual_seed(seed)
        direct = saved(tmp_path, architecture)
        card = card_for(make_card, architecture, "panoptic", classes=4)
        batch = torch.randn(1, 4, edge, edge)
        fused = {} if architecture.startswith("Eomt") else {"label_ids_to_fuse": set()}
        [expected] = PROCESSORS[architecture]().post_process_panoptic_segmentation(
            answer(direct, batch),
            threshold=0.4,
            overlap_mask_area_threshold=0.3,
            target_sizes=[(edge, edge)],
            **fused,
        )
        [found] = ReadyObjects(card, build(card, CPU, 1), "fp32", 1).objects(batch)
        infos = expected["segments_info"]
        assert_same_segments(found, expected["segmentation"].numpy(), infos)
        assert len(infos) > 1


def test_stuff_is_one_segment(make_card, tmp_path):
    torch.manual_seed(0)
    architecture = "EomtForUniversalSegmentation"
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "panoptic", classes=4)
    batch = torch.randn(1, 4, 64, 64)
    out = answer(direct, batch)
    common = 2  # a label of two segments
    stuff = card.classes[1 + common].model_copy(update={"thing": False})
    classes = [stuff if c.value == stuff.value else c for c in card.classes]
    card = card.model_copy(update={"classes": classes})
    [expected] = PROCESSORS[architecture]().post_process_panoptic_segmentation(
        out, [(64, 64)], threshold=0.4, overlap_mask_area_threshold=0.3, stuff_classes=[common]
    )
    [found] = ReadyObjects(card, build(card, CPU, 1), "fp32", 1).objects(batch)
    segmentation = expected["segmentation"].numpy()
    assert len(found.classes) == len(expected["segments_info"])
    for info in expected["segments_info"]:
        [k] = np.unique(found.ids[segmentation == info["id"]])
        assert np.array_equal(found.ids == k, segmentation == info["id"])
        assert found.classes[k - 1] == info["label_id"] + 1
    assert found.classes.tolist().count(1 + common) == 1


def instances_of(architecture, out, masks, threshold):
    """(score, label, mask) of the processor's instances; ``masks``: probabilities at the window's size."""
    if architecture.startswith("Eomt"):
        [one] = PROCESSORS[architecture]().post_process_instance_segmentation(out, [(64, 64)], threshold)
        return one["segments_info"], one["segmentation"].numpy()
    logits = torch.logit(masks.double())  # above 0 exactly where the probability is above one half
    # OneFormer's processor lets masks compete before they are masks; its authors' rule is MaskFormer's.
    [one] = t.MaskFormerImageProcessor().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=out.class_queries_logits, masks_queries_logits=logits),
        threshold=threshold,
        return_binary_maps=True,
    )
    return one["segments_info"], one["segmentation"].numpy()


@pytest.mark.parametrize("architecture", QUERIES[:3])
def test_instances_are_the_processors(make_card, tmp_path, architecture):
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "instance", classes=4)
    batch = torch.randn(1, 4, 64, 64)
    out = answer(direct, batch)
    logits = out.masks_queries_logits
    if architecture in LOW_RESOLUTION:
        masks = torch.nn.functional.interpolate(logits.sigmoid(), size=(64, 64), mode="bilinear")
    else:
        masks = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").sigmoid()
    infos, maps = instances_of(architecture, out, masks, 0.4)
    expected = sorted((i["score"], i["label_id"] + 1, m.tobytes()) for i, m in zip(infos, maps, strict=True))
    network = build(card, CPU, 1)
    with torch.inference_mode():
        [found] = network.candidates(batch)
    own = [
        (s, c, (m > 0.5).astype(np.float32).tobytes())
        for s, c, m in zip(found.scores, found.classes, found.masks, strict=True)
        if s >= 0.4 and (m > 0.5).any()
    ]
    assert len(own) == len(expected) > 1
    assert sorted(e[1:] for e in own) == sorted(e[1:] for e in expected)
    assert np.allclose(sorted(e[0] for e in own), [e[0] for e in expected], atol=1e-5)


def test_eomt_instances_are_painted_in_their_order(make_card, tmp_path):
    """The processor lets the last query paint over the others, this library the best: where they agree."""
    architecture = "EomtForUniversalSegmentation"
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "instance", classes=4)
    batch = torch.randn(2, 4, 64, 64)
    out = answer(direct, batch[:1])
    infos, segmentation = instances_of(architecture, out, None, 0.4)
    network = build(card, CPU, 1)
    with torch.inference_mode():
        [found] = network.candidates(batch[:1])
    kept = [k for k in range(len(found.scores)) if found.scores[k] >= 0.4 and (found.masks[k] > 0.5).any()]
    assert [i["label_id"] + 1 for i in infos] == found.classes[kept].tolist() and len(kept) > 1
    assert np.allclose([i["score"] for i in infos], found.scores[kept], atol=1e-5)
    painted = np.full((64, 64), -1)
    for number, k in enumerate(kept):
        painted[found.masks[k] > 0.5] = number
    assert np.array_equal(painted, segmentation)


@pytest.mark.parametrize(
    "architecture", ["MaskFormerForInstanceSegmentation", "EomtForUniversalSegmentation"]
)
def test_place_in_a_batch_changes_no_bit(make_card, tmp_path, architecture):
    saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "panoptic", classes=4)
    model = ReadyObjects(card, build(card, CPU, 1), "fp32", 1)
    batch = torch.randn(3, 4, 64, 64)
    together = model.objects(batch)
    for k in range(3):
        [alone] = model.objects(batch[k : k + 1])
        assert np.array_equal(together[k].ids, alone.ids)
        assert together[k].scores.tobytes() == alone.scores.tobytes()


def test_one_former_task_is_tokenised_as_its_processor_does(make_card, tmp_path):
    """Words of a CLIP tokenizer's own form, from files in the folder; zeros after the end."""
    direct = saved(tmp_path, "OneFormerForUniversalSegmentation")
    letters = sorted(set("the task is semantic panoptic instance") - {" "})
    words = [*letters, *(f"{c}</w>" for c in letters), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "net" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "net" / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    tokenizer = t.CLIPTokenizer.from_pretrained(tmp_path / "net", local_files_only=True)
    processor = t.OneFormerProcessor(one_former_processor(), tokenizer, 77, 40)
    direct.config.task_seq_len = 40  # "the task is panoptic", letter by letter, is long
    direct = t.OneFormerForUniversalSegmentation(direct.config).eval()
    direct.save_pretrained(tmp_path / "net")
    batch = torch.randn(1, 4, 64, 64)
    answers = []
    for task in ("semantic", "panoptic"):
        tokens = processor._preprocess_text([f"the task is {task}"], max_length=40)
        assert int(tokens[0, 0]) == words.index("<|startoftext|>") and int(tokens[0, 1]) == words.index(
            "the</w>"
        )
        with torch.inference_mode():
            out = direct(pixel_values=batch, task_inputs=tokens)
        [expected] = one_former_processor().post_process_semantic_segmentation(
            out, [(64, 64)], return_segmentation_scores=True
        )
        card = card_for(make_card, "OneFormerForUniversalSegmentation", arguments={"task": task})
        found = load_model(card, "cpu", 1, "fp32")(batch)[0]
        assert torch.allclose(found, expected.segmentation_scores, atol=1e-5)
        answers.append(found)
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)


def test_one_former_without_words_for_its_task_is_refused(make_card, tmp_path):
    saved(tmp_path, "OneFormerForUniversalSegmentation")
    for arguments, told in [
        ({}, "arguments.task_tokens: none given, and .* holds no tokenizer"),
        ({"task": "depth"}, "arguments.task: found 'depth'; valid: semantic, instance, panoptic"),
        ({"task_tokens": [1.5]}, r"arguments.task_tokens: found \[1.5\]; valid: 1 to 20 whole numbers"),
        ({"task_tokens": [1] * 21}, "arguments.task_tokens: found"),
    ]:
        with pytest.raises(RequestError, match=told):
            check_card(card_for(make_card, "OneFormerForUniversalSegmentation", arguments=arguments))


def rewritten(folder, **keys):
    path = folder / "net" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("architecture", "fields", "told"),
    [
        ("BeitForSemanticSegmentation", {"window": {}}, r"window.size: found \[64\], fixed false; .* 64"),
        ("DPTForSemanticSegmentation", {"window": {"size": [96], "fixed": True}}, "window.size: found"),
        ("DetrForSegmentation", {"kind": "instance"}, "output.kind: found instance; valid for DetrForSeg"),
        ("DetrForSegmentation", {"output": {}}, "output.activation: found softmax; .* valid: none"),
        (
            "DetrForSegmentation",
            {"kind": "panoptic", "classes": 2},
            r"classes: found 2 \(1 without background",
        ),
        ("DetrForSegmentation", {"bands": 3}, "input.bands: found 3; .* num_channels 4"),
        ("DetrForSegmentation", {"classes": 2}, "classes: the card needs 2 output channels; .* has 3 labels"),
        ("DetrForSegmentation", {"arguments": {"num_queries": 3}}, "arguments.num_queries: unknown"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(make_card, tmp_path, architecture, fields, told):
    saved(tmp_path, architecture)
    with pytest.raises(RequestError, match=told):
        check_card(card_for(make_card, architecture, **fields))


def test_nothing_is_fetched_and_no_code_is_run(make_card, tmp_path):
    architecture = "UperNetForSemanticSegmentation"
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture)
    batch = torch.randn(1, 4, 64, 64)
    expected = answer(direct, batch).logits
    evil = {"auto_map": {"AutoModel": "evil.Net"}, "attn_implementation": "someone/kernel"}
    rewritten(tmp_path, **evil, quantization_config={"quant_method": "evil"})
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)
    rewritten(tmp_path, backbone="someone/backbone", backbone_config=None)
    with pytest.raises(RequestError, match=r"names its backbone .* would have to be asked for on the hub"):
        check_card(card)
    rewritten(tmp_path, backbone_config={"model_type": "timm_backbone", "backbone": "hf-hub:someone/net"})
    with pytest.raises(RequestError, match="valid: a name of timm itself"):
        check_card(card)


def test_weights_with_nan_or_an_adapter_are_refused(make_card, tmp_path):
    architecture = "DPTForSemanticSegmentation"
    saved(tmp_path, architecture)
    path = tmp_path / "net" / "model.safetensors"
    state = load_file(path)
    name = next(n for n in state if n.endswith("cls_token"))
    save_file({**state, name: state[name] * torch.nan}, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=rf"weights: {name} in .* NaN"):
        build(card_for(make_card, architecture), CPU, 1)
    (tmp_path / "net" / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="holds an adapter"):
        build(card_for(make_card, architecture), CPU, 1)


EOMT = {
    "image_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_blocks": 1,
    "num_queries": 12,
    "num_register_tokens": 0,
}


def test_untrained_networks_are_made_from_arguments(make_card):
    fields = {"weights": "", "window": {"fixed": True}}
    eomt = make_card(
        "transformers",
        architecture="EomtForUniversalSegmentation",
        output={"kind": "panoptic"},
        arguments=EOMT,
        classes=4,
        **fields,
    )
    network = untrained(eomt).train()
    masks = torch.zeros(1, 64, 64)
    masks[0, :20] = 1
    network(torch.randn(1, 4, 64, 64), mask_labels=[masks], class_labels=[torch.tensor([2])]).loss.backward()
    assert network.class_predictor.out_features == 4  # three classes, and no object
    assert float(network.class_predictor.weight.grad.abs().sum()) > 0
    segformer = {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    }
    card = make_card(
        "transformers",
        architecture="SegformerForSemanticSegmentation",
        arguments=segformer,
        bands=7,
        weights="",
    )
    assert untrained(card)(torch.randn(1, 7, 64, 64)).shape == (1, 3, 16, 16)
    for arguments, told in [
        ({"hidden_size": 4}, "arguments.hidden_size: unknown; valid: fields of SegformerConfig"),
        ({"attn_implementation": "x/y"}, "arguments.attn_implementation: unknown"),
        ({"depths": "many"}, "arguments: SegformerConfig refuses"),
        ({"num_channels": 3}, "input.bands: found 7; arguments says num_channels 3"),
    ]:
        with pytest.raises(RequestError, match=told):
            untrained(card.model_copy(update={"arguments": arguments}))


@pytest.mark.skipif(Provider.transformers not in ENDINGS, reason="weights.py takes folders alone for now")
def test_trained_tensors_come_back_from_one_file(make_card, tmp_path):
    architecture = "EomtForUniversalSegmentation"
    network = untrained(card_for(make_card, architecture, weights="", arguments=EOMT)).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    card = card_for(make_card, architecture, weights="w.safetensors", arguments=EOMT)
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        expected = network(batch)
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)

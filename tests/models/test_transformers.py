"""transformers: scores are those of the library's networks and image processors; what is refused."""

import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from segpipe.errors import RequestError
from segpipe.models.providers.transformers import build
from segpipe.models.registry import check_card, load_model
from segpipe.models.trainable import untrained
from tests.models.tiny_transformers import (
    CONFIGS,
    EOMT,
    PROCESSORS,
    QUERIES,
    SEEDS,
    answer,
    card_for,
    one_former_processor,
    saved,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - set(QUERIES)))
def test_logits_equal_the_library_upsampled(make_card, tmp_path, architecture):
    direct = saved(tmp_path, architecture)
    batch = torch.randn(1, 4, 64, 64)
    logits = answer(direct, batch).logits
    expected = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    found = load_model(card_for(make_card, architecture), "cpu", 1, "fp32")(batch)
    # Tensors mapped from a file lie elsewhere in memory, which can change the order of sums.
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
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
    assert torch.allclose(found, expected.segmentation_scores, atol=1e-4)
    # Classes whose scores are the same but for rounding may change places.
    best = expected.segmentation_scores.topk(2, dim=0).values
    clear = best[0] - best[1] > 2e-4
    assert float(clear.float().mean()) > 0.99
    assert torch.equal(found.argmax(0)[clear], expected.segmentation[clear])
    assert float(found.std()) > 0.01
    assert len(expected.segmentation.unique()) > 1 or architecture.startswith("Detr")


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
        assert torch.allclose(found, expected.segmentation_scores, atol=1e-4)
        answers.append(found)
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


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
    found = load_model(card, "cpu", 1, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
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


def test_trained_tensors_come_back_from_one_file(make_card, tmp_path):
    architecture = "EomtForUniversalSegmentation"
    network = untrained(card_for(make_card, architecture, weights="", arguments=EOMT)).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    card = card_for(make_card, architecture, weights="w.safetensors", arguments=EOMT)
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        expected = network(batch)
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)

"""Ensembles: the mean of the members' probabilities, written out; their keys follow the members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.networks.nets import UNet
from safetensors.torch import save_file

from segpipe.config.card import Card, load_card
from segpipe.errors import RequestError
from segpipe.models.registry import check_card, describe, load_model
from segpipe.models.weights import weights_fingerprint

ARGUMENTS = {"channels": [4, 8], "strides": [2], "num_res_units": 1}
CLASSES = [{"value": v, "name": n, "color": "#000000"} for v, n in ((0, "no"), (7, "low"), (9, "high"))]


def write_card(folder: Path, name: str, **fields: Any) -> Card:
    data = {
        "name": name,
        "kind": "raster",
        "provider": "monai",
        "architecture": "UNet",
        "arguments": ARGUMENTS,
        "weights": f"{name}.safetensors",
        "input": {"bands": ["red", "nir"], "normalisation": [{"op": "divide", "value": [255]}]},
        "window": {"size": [32], "stride": 2},
        "classes": CLASSES,
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return load_card(path)


def write_member(folder: Path, name: str, seed: int, out: int = 3, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    dropout = fields.get("arguments", {}).get("dropout", 0.0)
    network = UNet(2, 2, out, ARGUMENTS["channels"], [2], num_res_units=1, dropout=dropout).eval()
    for parameter in network.parameters():
        parameter.data *= 3  # far from even probabilities
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    write_card(folder, name, **fields)
    return network


def ensemble(folder: Path, **fields: Any) -> Card:
    return write_card(
        folder,
        "both",
        **{
            "provider": "ensemble",
            "architecture": None,
            "weights": None,
            "arguments": {"cards": ["a.yaml", "b.yaml"]},
            "output": {"activation": "none"},
            **fields,
        },
    )


@pytest.fixture
def two(tmp_path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """``a`` and ``b``, logits under a softmax."""
    return write_member(tmp_path, "a", 1), write_member(tmp_path, "b", 2)


def test_mean_of_probabilities(tmp_path, two):
    batch = torch.randn(3, 2, 32, 32)
    with torch.inference_mode():
        expected = (two[0](batch).softmax(1) + two[1](batch).softmax(1)) / 2
        of_logits = ((two[0](batch) + two[1](batch)) / 2).softmax(1)
    card = ensemble(tmp_path)
    check_card(card)
    found = load_model(card, "cpu", 1, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - of_logits).abs().max() > 0.01  # another mean, which this one is not
    assert torch.allclose(found.sum(1), torch.ones(3, 32, 32), atol=1e-5)


def test_members_of_other_activations_are_activated_each_by_its_own(tmp_path):
    """One logit under a sigmoid, and two under a softmax: both as probabilities of two classes."""
    one = write_member(tmp_path, "a", 1, out=1, classes=CLASSES[:2], output={"activation": "sigmoid"})
    two = write_member(tmp_path, "b", 2, out=2, classes=CLASSES[:2])
    batch = torch.randn(1, 2, 32, 32)
    with torch.inference_mode():
        high = one(batch).sigmoid()
        expected = (torch.cat([1 - high, high], 1) + two(batch).softmax(1)) / 2
    found = load_model(ensemble(tmp_path, classes=CLASSES[:2]), "cpu", 1, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-6)


def test_fingerprint_follows_every_member(tmp_path, two):
    card = ensemble(tmp_path)
    first = weights_fingerprint(card)
    assert weights_fingerprint(ensemble(tmp_path)) == first
    found = describe(card)
    assert found.weights_bytes == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in "ab")
    assert found.parameters == sum(p.numel() for net in two for p in net.parameters())
    write_card(tmp_path, "b", scores="a text that changes no label")
    assert weights_fingerprint(card) == first
    write_card(tmp_path, "b", window={"size": [64], "stride": 2})
    second = weights_fingerprint(card)
    write_member(tmp_path, "b", 3, window={"size": [64], "stride": 2})
    assert len({first, second, weights_fingerprint(card)}) == 3


@pytest.mark.parametrize(
    ("member", "own", "told"),
    [
        ({"classes": CLASSES[:2]}, {}, "classes: found [0, 7, 9]; its member b has [0, 7]"),
        (
            {"input": {"bands": ["red", "blue"]}},
            {},
            "input.bands: found ['red', 'nir']; its member b has ['red', ",
        ),
        ({"input": {"bands": ["red", "nir"]}}, {}, "input.normalisation: found"),
        ({"input": {"bands": ["red", "nir"], "spacing": [10, 10]}}, {}, "input.spacing: found None"),
        ({"window": {"size": [32], "stride": 4}}, {}, "window.stride: found 2; b has 4: valid: a multiple"),
        ({"window": {"size": [64], "stride": 2, "fixed": True}}, {}, "window: b takes [64, 64] only"),
        ({"output": {"kind": "instance"}}, {}, "output.kind: found semantic; its member b has instance"),
        ({"provider": "ensemble", "arguments": {"cards": ["a.yaml"]}}, {}, "b.yaml is an ensemble"),
        ({}, {"output": {}}, "output: an ensemble's answer is a mean of probabilities"),
        ({}, {"weights": "a.safetensors"}, "weights: found 'a.safetensors'"),
        ({}, {"arguments": {}}, "arguments: valid: `cards`"),
        ({}, {"arguments": {"cards": ["gone.yaml"]}}, "gone.yaml"),
        ({}, {"arguments": {"cards": ["a.yaml"], "dropout": 4}}, "arguments.dropout: goes with `card`"),
        (
            {},
            {"arguments": {"card": "a.yaml", "dropout": 1}},
            "arguments.dropout: found 1; valid: a whole number",
        ),
        ({}, {"arguments": {"card": "a.yaml", "dropout": 4}}, "its member has no dropout layers"),
    ],
)
def test_members_that_do_not_agree_are_refused(tmp_path, two, member, own, told):
    write_card(tmp_path, "b", **member)
    card = ensemble(tmp_path, **own)
    with pytest.raises(RequestError) as error:
        check_card(card)
        load_model(card, "cpu", 1, "fp32")
    assert told in str(error.value)


@pytest.fixture
def dropping(tmp_path: Path) -> torch.nn.Module:
    """``a`` with dropout of 0.3."""
    return write_member(tmp_path, "a", 1, arguments={**ARGUMENTS, "dropout": 0.3})


def monte_carlo(folder: Path, passes: int, seed: int) -> Card:
    return ensemble(folder, arguments={"card": "a.yaml", "dropout": passes, "seed": seed})


def test_dropout_equals_a_loop_over_seeds(tmp_path, dropping):
    batch = torch.randn(2, 2, 32, 32)
    found = load_model(monte_carlo(tmp_path, 3, 11), "cpu", 1, "fp32")(batch)
    with torch.inference_mode():
        still = dropping(batch).softmax(1)
        for layer in dropping.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.train()
        expected = torch.zeros(2, 3, 32, 32)
        for row in range(2):
            for seed in (11, 12, 13):
                torch.manual_seed(seed)
                expected[row] += dropping(batch[row : row + 1])[0].softmax(0) / 3
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - still).abs().max() > 0.01


def test_dropout_depends_on_neither_batch_order_nor_callers_seed(tmp_path, dropping):
    model = load_model(monte_carlo(tmp_path, 3, 0), "cpu", 1, "fp32")
    batch = torch.randn(3, 2, 32, 32)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    together = model(batch)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's own stream goes on untouched
    torch.manual_seed(5)
    for row in (2, 0, 1):
        assert torch.equal(model(batch[row : row + 1])[0], together[row])
    other = load_model(monte_carlo(tmp_path, 3, 50), "cpu", 1, "fp32")(batch)
    assert not torch.equal(other, together)

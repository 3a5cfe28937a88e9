"""MONAI bundles: the network that MONAI's own parser makes of them, and nothing in them runs."""

from __future__ import annotations

import json
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from segpipe.errors import RequestError
from segpipe.models.providers.bundle.files import card_from_bundle
from segpipe.models.registry import check_card, load_model

NETWORK = {
    "_target_": "UNet",
    "spatial_dims": "@dims",
    "in_channels": 1,
    "out_channels": 2,
    "channels": "@size::channels",
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
"""As in the model zoo's spleen_ct_segmentation, smaller and with references."""
INFERENCE = {
    "imports": ["$import os"],
    "bundle_root": ".",
    "dims": 3,
    "size": {"channels": [4, 8, 8]},
    "device": "$torch.device('cpu')",
    "network_def": NETWORK,
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "image",
                "a_min": -57,
                "a_max": 164,
                "b_min": 0,
                "b_max": 1,
                "clip": True,
            },
            {"_target_": "EnsureTyped", "keys": "image"},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 24], "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}],
    },
}
METADATA = {
    "version": "0.2.0",
    "task": "Decathlon spleen segmentation",
    "data_source": "Task09_Spleen.tar",
    "eval_metrics": {"mean_dice": 0.96},
    "network_data_format": {
        "inputs": {
            "image": {
                "modality": "CT",
                "num_channels": 1,
                "spatial_shape": [16, 16, 24],
                "channel_def": {"0": "image"},
            }
        },
        "outputs": {"pred": {"num_channels": 2, "channel_def": {"0": "background", "1": "spleen"}}},
    },
}


def library_network(config: dict) -> torch.nn.Module:
    """What MONAI's own parser makes of the definition."""
    parser = ConfigParser(deepcopy(config))
    parser.parse()
    return parser.get_parsed_content("network_def").eval()


def write_bundle(
    folder: Path, config: dict, metadata: dict = METADATA, form: str = "json"
) -> torch.nn.Module:
    """A bundle on disk; the network whose weights it holds."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    text = json.dumps(config) if form == "json" else yaml.safe_dump(config)
    (folder / "configs" / f"inference.{form}").write_text(text)
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.manual_seed(5)
    network = library_network(INFERENCE)
    for name, values in network.named_buffers():
        if name.endswith("running_mean"):
            values.uniform_(-0.1, 0.1)
    torch.save({"model": network.state_dict()}, folder / "models" / "model.pt")
    return network


def zipped(folder: Path, inside: str) -> Path:
    """The folder as a zip, its files below ``inside``."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.txt", "a name that leads out")
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, inside + str(file.relative_to(folder)))
    return path


@pytest.mark.parametrize("form", ["json", "yaml", "zip", "zip inside its folder"])
def test_equals_the_network_of_monais_own_parser(tmp_path, form):
    folder = tmp_path / "spleen"
    network = write_bundle(folder, INFERENCE, form="yaml" if form == "yaml" else "json")
    path = zipped(folder, "spleen_ct/" if "inside" in form else "") if "zip" in form else folder
    card = card_from_bundle(path)
    check_card(card)
    batch = torch.randn(2, 1, 16, 16, 24)
    with torch.inference_mode():
        expected = network(batch)
    found = load_model(card, "cpu", 1, "fp32")(batch)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(found.std()) > 0
    assert not (tmp_path.parent / "escaped.txt").exists()


def test_card_says_what_the_bundle_says(tmp_path):
    write_bundle(tmp_path / "spleen", INFERENCE)
    card = card_from_bundle(tmp_path / "spleen")
    assert (card.kind, card.architecture, card.name) == ("volume", "UNet", "spleen")
    assert card.input.orientation == "LPS"
    assert card.input.spacing == [1.5, 1.5, 2.0]
    assert card.window.size == [16, 16, 24]
    assert card.window.fixed
    assert card.halo == (4, 4, 6)
    assert [c.name for c in card.classes] == ["background", "spleen"]
    assert card.output.activation == "softmax"
    assert card.scores == "mean_dice 0.96"
    assert "Not carried over" not in card.limits


def test_normalisation_equals_the_transform(tmp_path):
    from monai.transforms import ScaleIntensityRange

    from segpipe.inference.normalise import Normaliser, Statistics
    from segpipe.sources.base import Pixels, Scaling

    write_bundle(tmp_path / "spleen", INFERENCE)
    card = card_from_bundle(tmp_path / "spleen")
    values = torch.linspace(-500, 500, 64).reshape(1, 4, 4, 4)
    expected = ScaleIntensityRange(-57, 164, 0, 1, clip=True)(values)
    normaliser = Normaliser(card, (Scaling(),), Statistics(((), ())))
    pixels = Pixels(values.numpy(), torch.ones(4, 4, 4, dtype=torch.bool).numpy())
    found = torch.from_numpy(normaliser.elementwise(pixels))
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-5)


def test_what_is_not_carried_over_is_said(tmp_path):
    config = deepcopy(INFERENCE)
    config["preprocessing"]["transforms"] += [
        {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": "$True"},
    ]
    write_bundle(tmp_path / "spleen", config)
    limits = card_from_bundle(tmp_path / "spleen").limits
    assert "Not carried over: the bundle's CropForegroundd." in limits
    assert "NormalizeIntensityd.nonzero: found '$True', a program" in limits


def test_one_channel_is_a_sigmoid_and_several_overlap(tmp_path):
    config, metadata = deepcopy(INFERENCE), deepcopy(METADATA)
    metadata["network_data_format"]["outputs"]["pred"] = {"num_channels": 1, "channel_def": {"0": "spleen"}}
    config["postprocessing"]["transforms"] = [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]
    write_bundle(tmp_path / "one", config, metadata)
    card = card_from_bundle(tmp_path / "one")
    assert card.output.activation == "sigmoid"
    assert [c.name for c in card.classes] == ["background", "spleen"]
    write_bundle(tmp_path / "two", config)
    with pytest.raises(RequestError, match="its masks overlap"):
        card_from_bundle(tmp_path / "two")


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"_target_": "os.system"}, "_target_ 'os.system'; valid: classes of monai.networks.nets"),
        (
            {"_target_": "monai.networks.nets.unet.UNet", "norm": "$__import__('os').mkdir('ran')"},
            "a program",
        ),
        ({"_target_": "FullyConnectedNet"}, "architecture: found 'FullyConnectedNet'"),
        ({"in_channels": "@device"}, 'network_def.in_channels: found "\\$torch.device'),
        ({"in_channels": "@nothing"}, "found '@nothing', which names nothing plain"),
        ({"channels": "%../other.json::channels"}, "a program"),
        ({"norm": {"_target_": "os.system"}}, "found '_target_', an object to be made"),
        ({"_requires_": "$1"}, "network_def._requires_: found"),
        ({"in_channels": 3}, "input.bands: the card makes in_channels 1; the bundle's network has 3"),
        ({"out_channels": 5}, "classes: the card makes out_channels 2; the bundle's network has 5"),
        ({"channels": [4, 8, 16]}, "do not fit the file"),
    ],
)
def test_programs_and_misfits_are_refused(tmp_path, monkeypatch, network, told):
    monkeypatch.chdir(tmp_path)
    write_bundle(tmp_path / "spleen", INFERENCE)
    card = card_from_bundle(tmp_path / "spleen").model_copy(update={"architecture": None})
    config = {**INFERENCE, "network_def": {**NETWORK, **network}}
    (tmp_path / "spleen" / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=told):
        load_model(card, "cpu", 1, "fp32")
    assert not (tmp_path / "ran").exists()


def test_references_in_a_circle_end(tmp_path):
    config = {**INFERENCE, "dims": "@more", "more": "@dims"}
    write_bundle(tmp_path / "spleen", config)
    with pytest.raises(RequestError, match="in a circle"):
        card_from_bundle(tmp_path / "spleen")


def test_other_weights_and_damage_are_told(tmp_path):
    folder = tmp_path / "spleen"
    write_bundle(folder, INFERENCE)
    card = card_from_bundle(folder)
    (folder / "models" / "model.pt").rename(folder / "models" / "model.ts")
    with pytest.raises(RequestError, match=r"found none of models/model.safetensors, models/model.pt"):
        check_card(card)
    (folder / "configs" / "inference.json").write_text("{")
    with pytest.raises(RequestError, match=r"inference.json is not readable"):
        check_card(card)
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(RequestError, match="not a readable zip"):
        card_from_bundle(tmp_path / "broken.zip")

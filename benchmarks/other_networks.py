"""Rows of networks that come as files or folders of other tools, and of an ensemble."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.networks import Family, families, family_card, probabilities
from benchmarks.rows import BANDS, CLASSES, Made, Row, best, write_card
from segpipe.config.card import Card


def rows() -> list[Row]:
    """All of them."""
    unet = "(Unet, resnet18)"
    return [
        Row("nnU-Net PlainConvUNet 3D, two folds", "nnunet",
            partial(_nnunet, network="PlainConvUNet", folds=(0, 1), mirror=False), 3),
        Row("nnU-Net ResidualEncoderUNet 3D, mirrored", "nnunet",
            partial(_nnunet, network="ResidualEncoderUNet", folds=(0,), mirror=True), 3),
        Row("MONAI bundle (UNet 3D)", "bundle", _bundle, 3),
        Row(f"ONNX {unet}", "onnx", _onnx),
        Row(f"torch.export {unet}", "exported", _exported),
        Row(f"TorchScript {unet}", "torchscript", _torchscript),
        Row("ensemble of Unet and FPN (resnet18)", "ensemble", _ensemble),
    ]  # fmt: skip


# -- folders of other tools -----------------------------------------------------------------------

PATCH = [80, 64, 64]
"""Of nnU-Net, in its network's order of axes, which is (1, 0, 2) of the image's."""
ORDER = [1, 0, 2]


RESAMPLING = {
    f"resampling_fn_{what}{end}": value
    for what in ("data", "seg", "probabilities")
    for end, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": what == "seg", "order": 1}),
    )
}


def _plans(network: str) -> dict[str, Any]:
    """As nnU-Net writes them, for 80³ voxels of 1 mm and a small network."""
    conv = "n_conv_per_stage" if network == "PlainConvUNet" else "n_blocks_per_stage"
    arguments = {
        "n_stages": 4,
        "features_per_stage": [8, 16, 32, 64],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 4,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        conv: [1, 2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "made",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **RESAMPLING,
    }
    return {
        "dataset_name": "Dataset900_Random",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": ORDER,
        "transpose_backward": ORDER,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"3d_fullres": configuration},
    }


def _nnunet_folder(root: Path, plans: dict[str, Any]) -> Path:
    """Two folds, as nnU-Net's own trainer makes and saves them."""
    for key in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{key}"] = str(root / key)
    os.environ["nnUNet_def_n_proc"] = "1"  # noqa: SIM112 - its name
    cases = root / "preprocessed" / plans["dataset_name"] / "made"
    cases.mkdir(parents=True)
    (cases / "case.b2nd").touch()  # the trainer looks at its ending
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    dataset = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, **{f"c{i}": i for i in range(1, CLASSES)}},
        "file_ending": ".nii.gz",
    }
    for fold in (0, 1):
        trainer = nnUNetTrainer(
            {**plans, "continue_training": False}, "3d_fullres", fold, dataset, torch.device("cpu")
        )
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        folder = Path(trainer.output_folder).parent
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def _nnunet(root: Path, *, network: str, folds: tuple[int, ...], mirror: bool) -> Made:
    """Held against nnU-Net's own predictor's network: mirror images, then the mean of the folds' logits."""
    from segpipe.models.providers.nnunet.plans import card_from_nnunet

    folder = _nnunet_folder(root, _plans(network))
    card = card_from_nnunet(folder)
    card.arguments.update(folds=list(folds), mirror=mirror)
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    axes = (0, 1, *(2 + axis for axis in ORDER))

    def labels(x: torch.Tensor) -> np.ndarray:
        total = torch.zeros(())
        for state in predictor.list_of_parameters:
            predictor.network.load_state_dict(state)
            predictor.network.eval()
            turned = x.permute(axes).contiguous()
            total = total + predictor._internal_maybe_mirror_and_predict(turned) / len(folds)
        return best(total.permute(axes))  # ORDER is its own inverse

    return Made(_saved(card, root), labels)


def _saved(card: Card, folder: Path) -> Path:
    """A card that segpipe wrote from another tool's files, on disk."""
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(card.model_dump(mode="json", exclude_unset=True)))
    return path


def _bundle(root: Path) -> Made:
    """Held against the network that MONAI's own parser makes of the bundle's configuration."""
    from monai.bundle.config_parser import ConfigParser

    from segpipe.models.providers.bundle.files import card_from_bundle

    config = {
        "dims": 3,
        "network_def": {
            "_target_": "UNet", "spatial_dims": "@dims", "in_channels": 1, "out_channels": CLASSES,
            "channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 2, "norm": "batch",
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [48, 48, 48], "overlap": 0.5},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}],
        },
    }  # fmt: skip
    shape = {"modality": "T1", "num_channels": 1, "spatial_shape": [48, 48, 48]}
    named = {str(i): f"c{i}" for i in range(CLASSES)}
    formats = {
        "inputs": {"image": {**shape, "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"num_channels": CLASSES, "channel_def": named}},
    }
    metadata = {"version": "0.1.0", "task": "random weights", "network_data_format": formats}
    folder = root / "bundle"
    for part in ("configs", "models"):
        (folder / part).mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    parser = ConfigParser(config)
    parser.parse()
    network = parser.get_parsed_content("network_def").eval()
    torch.save({"model": network.state_dict()}, folder / "models" / "model.pt")
    return Made(_saved(card_from_bundle(folder), root), lambda x: best(network(x)))


# -- programs in a file ---------------------------------------------------------------------------


def _direct(name: str) -> tuple[Family, torch.nn.Module]:
    """A family of `benchmarks.networks` and its network with random weights."""
    family = next(f for f in families() if f.name == name)
    return family, family.make().eval()


def _program(
    folder: Path, provider: str, file: str, labels: Callable[[torch.Tensor], np.ndarray], **more: Any
) -> Made:
    card = write_card(folder, provider, weights=file, window={"fixed": True}, **more)
    return Made(card, labels)


EXAMPLE = (1, BANDS, 256, 256)


def _onnx(folder: Path) -> Made:
    """Held against onnxruntime's own session."""
    import onnxruntime

    _, network = _direct("Unet (resnet18)")
    path = folder / "net.onnx"
    torch.onnx.export(
        network, (torch.zeros(EXAMPLE),), path, dynamo=True, external_data=False, verbose=False,
        input_names=["image"], output_names=["scores"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def labels(x: torch.Tensor) -> np.ndarray:
        return np.asarray(session.run(None, {"image": x.numpy()})[0][0].argmax(0))

    return _program(folder, "onnx", path.name, labels)


def _exported(folder: Path) -> Made:
    """Held against the program as torch.export loads it."""
    _, network = _direct("Unet (resnet18)")
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(EXAMPLE),)), path)
    program = torch.export.load(path).module()
    return _program(folder, "exported", path.name, lambda x: best(program(x)))


def _torchscript(folder: Path) -> Made:
    """Held against the program as torch.jit loads it."""
    _, network = _direct("Unet (resnet18)")
    path = folder / "net.pt"
    torch.jit.trace(network, torch.zeros(EXAMPLE)).save(str(path))
    program = torch.jit.load(str(path))
    return _program(folder, "torchscript", path.name, lambda x: best(program(x)), allow_torchscript=True)


def _ensemble(folder: Path) -> Made:
    """Held against the mean of the members' own probabilities."""
    members = [_direct(name) for name in ("Unet (resnet18)", "FPN (resnet18)")]
    cards = [family_card(f, net, folder, f"member{i}").name for i, (f, net) in enumerate(members)]
    calls = [(probabilities(f, net), net) for f, net in members]
    card = write_card(folder, "ensemble", arguments={"cards": cards}, output={"activation": "none"})
    return Made(card, lambda x: best((calls[0][0](calls[0][1], x) + calls[1][0](calls[1][1], x)) / 2))

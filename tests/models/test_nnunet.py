"""Trained nnU-Net folders: written by nnU-Net's own trainer, compared with its own predictor."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.inference.merge import GaussianScores
from segpipe.models.network import activate
from segpipe.models.providers.nnunet.network import read_checkpoint
from segpipe.models.providers.nnunet.plans import card_from_nnunet, read_plan
from segpipe.models.registry import check_card, load_model
from segpipe.tiling.windows import make_lattice

os.environ["nnUNet_def_n_proc"] = "1"  # noqa: SIM112 - its name for threads, read when it is imported
pytest.importorskip("nnunetv2", reason="needs nnunetv2, the package that these folders come from")

SPACING = [2.0, 1.0, 1.5]
PATCH = [16, 24, 32]
TRANSPOSE = [1, 0, 2]
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [6, 12, 12],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
RESAMPLING = {
    f"resampling_fn_{what}{end}": value
    for what in ("data", "seg", "probabilities")
    for end, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": what == "seg", "order": 1}),
    )
}
PLANS = {
    "dataset_name": "Dataset900_Spheres",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": TRANSPOSE,
    "transpose_backward": TRANSPOSE,
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 90.0, "std": 30.0, "percentile_00_5": 10.0, "percentile_99_5": 200.0}
    },
    "configurations": {
        "base": {
            "data_identifier": "base",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": PATCH,
            "spacing": SPACING,
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "batch_dice": False,
            "architecture": ARCHITECTURE,
            **RESAMPLING,
        },
        "3d_fullres": {"inherits_from": "base", "batch_size": 4},
    },
}
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "sphere": 1, "core": 2},
    "file_ending": ".nii.gz",
}


def spheres(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright balls with brighter cores in noise, and their labels; values as of a CT."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    labels = np.zeros(shape, np.int64)
    for _ in range(max(1, int(np.prod(shape)) // 3000)):
        centre = rng.uniform(0, shape).reshape(-1, 1, 1, 1)
        distance = np.sqrt(((grid - centre) ** 2).sum(0))
        labels[(distance < 6) & (labels == 0)] = 1
        labels[distance < 3] = 2
    image = np.array([40, 110, 180])[labels] + rng.normal(0, 6, shape)
    return image.astype(np.float32), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of two folds: nnU-Net's own trainer takes some steps and writes its checkpoints."""
    root = tmp_path_factory.mktemp("nnunet")
    environment = {f"nnUNet_{k}": str(root / k) for k in ("raw", "preprocessed", "results")}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setitem(os.environ, key, value)
        (root / "preprocessed" / PLANS["dataset_name"] / "base").mkdir(parents=True)
        (
            root / "preprocessed" / PLANS["dataset_name"] / "base" / "case.b2nd"
        ).touch()  # its ending is looked at
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        torch.set_num_threads(1)
        for fold in (0, 1):
            torch.manual_seed(fold)
            plans = {**deepcopy(PLANS), "continue_training": False}
            trainer = nnUNetTrainer(plans, "3d_fullres", fold, DATASET, torch.device("cpu"))
            trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            trainer.initialize()
            trainer.network.train()
            # Learns faster than SGD of momentum 0.99: windows that agree need a network that knows its task.
            trainer.optimizer = torch.optim.Adam(trainer.network.parameters(), 1e-2)
            for step in range((50, 5)[fold]):
                trainer.train_step(_batch(trainer, 100 * fold + step))
            trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
            folder = Path(trainer.output_folder).parent
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


def _batch(trainer, seed: int) -> dict:
    """What nnU-Net's loader gives: normalised images, and labels at each resolution of the decoder."""
    image, labels = spheres(tuple(PATCH), seed)
    target = torch.from_numpy(labels)[None, None].float()
    scales = trainer._get_deep_supervision_scales()
    sizes = [[round(n * s) for n, s in zip(PATCH, scale, strict=True)] for scale in scales]
    return {
        "data": torch.from_numpy((np.clip(image, 10, 200) - 90) / 30)[None, None],
        "target": [torch.nn.functional.interpolate(target, size) for size in sizes],
    }


def predictor(folder: Path, folds: tuple[int, ...], mirror: bool):
    """nnU-Net's own, ready."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    found = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    found.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    return found


def with_arguments(card: Card, **arguments) -> Card:
    return card.model_copy(update={"arguments": {**card.arguments, **arguments}})


def test_card_says_what_the_plans_say(trained):
    """Plans are in the network's order of axes, (1, 0, 2) of the image's; a card is in the image's."""
    card = card_from_nnunet(trained)
    check_card(card)
    assert card.window.size == [24, 16, 32]
    assert card.input.spacing == [1.0, 2.0, 1.5]
    assert card.window.stride == 2  # strides 2, 4, 4 along the network's axes
    assert card.halo == (6, 4, 8)
    assert card.values == (0, 1, 2)
    assert [c.name for c in card.classes] == ["background", "sphere", "core"]
    steps = [step.model_dump() for step in card.input.normalisation]
    assert steps == [
        {"op": "clip", "low": 10.0, "high": 200.0},
        {"op": "subtract", "value": [90.0]},
        {"op": "divide", "value": [30.0]},
    ]


@pytest.mark.parametrize(("folds", "mirror"), [((0,), False), ((0, 1), False), ((1, 0), True)])
def test_one_window_equals_the_predictor(trained, folds, mirror):
    """nnU-Net sums windows in half precision, so one window's logits are compared on its network's output."""
    card = with_arguments(card_from_nnunet(trained), folds=list(folds), mirror=mirror)
    window = torch.randn(1, 1, *card.window_shape)
    found = load_model(card, "cpu", 1, "fp32")(window)
    theirs = predictor(trained, folds, mirror)
    turned = window.permute(0, 1, 3, 2, 4).contiguous()  # transpose_forward
    expected = torch.zeros(())
    for state in theirs.list_of_parameters:
        theirs.network.load_state_dict(state)
        theirs.network.eval()
        expected = expected + theirs._internal_maybe_mirror_and_predict(turned) / len(folds)
    assert torch.allclose(found, expected.permute(0, 1, 3, 2, 4), atol=1e-5)
    assert float(found.std()) > 0.1


def test_scene_agrees_with_the_predictor(trained):
    """From the stored image to labels at the plans' spacing: normalisation, transposition, Gaussian blend.

    In a scene of 5/4 of the window both lattices are the same, 0 and a quarter along each axis. With
    nnU-Net's own weights only its half precision sums are left, and means of logits instead of
    probabilities. Our Gaussian has its centre between the middle elements, not on the upper one: in windows
    as small as these, that moves one boundary element in three hundred.
    """
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    image, truth = spheres((30, 20, 40), 7)
    theirs = predictor(trained, (0,), False)
    spacing = {"spacing": [1.0, 2.0, 1.5]}
    expected = theirs.predict_single_npy_array(image[None], spacing, None, None, False)

    card = with_arguments(card_from_nnunet(trained), folds=[0])
    model = load_model(card, "cpu", 1, "fp32")
    clip, subtract, divide = card.input.normalisation
    x = (np.clip(image, clip.low, clip.high) - subtract.value[0]) / divide.value[0]
    lattice = make_lattice(x.shape, card.window_shape, card.halo, card.window.stride, card.window.fixed)
    whole = Box.whole(x.shape)
    ours = GaussianScores(whole, lattice, 3)
    weight = compute_gaussian(lattice.window_shape, 1 / 8, 10, device=torch.device("cpu")).float().numpy()
    total = np.zeros((3, *x.shape))
    for index in lattice.windows(whole, "gaussian"):
        place = lattice.window(index).slices
        scores = activate(model(torch.from_numpy(x[place][None, None].copy())), "softmax")[0].numpy()
        ours.aggregate(index, scores)
        total[(slice(None), *place)] += scores * weight
    for value in (1, 2):
        assert dice(total.argmax(0) == value, expected == value) > 0.998
        assert dice(ours.finalize().argmax(0) == value, expected == value) > 0.99
        # It has learned something: this is no agreement of noise.
        assert dice(expected == value, truth == value) > 0.85


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_checkpoint_is_read_without_running_code(trained, tmp_path):
    content = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth")
    full = torch.load(trained / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert content["init_args"]["configuration"] == "3d_fullres"
    for name, tensor in full["network_weights"].items():
        assert torch.equal(content["network_weights"][name], tensor)
    scalars = tmp_path / "scalars.pth"
    torch.save({**full, "_best_ema": np.float64(0.5), "more": np.float32(2)}, scalars)
    assert read_checkpoint(scalars)["_best_ema"] == 0.5

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**full, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RequestError, match="run code"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_inherited_and_old_plans_are_read_as_nnunet_does(tmp_path):
    """Plans before version 2.4, as TotalSegmentator's, describe the network in other words."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for kind in ("PlainConvUNet", "ResidualEncoderUNet"):
        plans = deepcopy(PLANS)
        base = plans["configurations"]["base"]
        del base["architecture"]
        base |= {
            "UNet_class_name": kind,
            "UNet_base_num_features": 8,
            "unet_max_num_features": 20,
            "n_conv_per_stage_encoder": [2, 3, 3],
            "n_conv_per_stage_decoder": [2, 1],
            "num_pool_per_axis": [1, 2, 2],
            "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        }
        (tmp_path / "plans.json").write_text(json.dumps(plans))
        (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
        theirs = PlansManager(deepcopy(plans)).get_configuration("3d_fullres")
        ours = read_plan(tmp_path, "3d_fullres")
        assert ours.arguments == theirs.network_arch_init_kwargs
        assert list(ours.imported) == theirs.network_arch_init_kwargs_req_import
        assert ours.network.rpartition(".")[2] == theirs.network_arch_class_name.rpartition(".")[2] == kind
        assert list(ours.patch) == theirs.patch_size
        assert ours.strides == (2, 4, 4)


def _folder(tmp_path: Path, plans: dict, dataset: dict) -> Path:
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    return tmp_path


def _changed(**base) -> dict:
    plans = deepcopy(PLANS)
    plans["configurations"]["base"] |= base
    return plans


@pytest.mark.parametrize(
    ("base", "dataset", "told"),
    [
        ({"previous_stage": "3d_lowres"}, {}, "second of a cascade"),
        ({"use_mask_for_norm": [True]}, {}, "inside their nonzero mask"),
        (
            {"normalization_schemes": ["MyNormalization"]},
            {},
            r"normalisation \['MyNormalization'\]; valid: CT",
        ),
        ({"patch_size": [32, 32], "spacing": [1, 1]}, {}, "slices of volumes"),
        ({}, {"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions"),
        ({}, {"labels": {"background": 0, "core": 2}}, r"labels \[0, 2\]; valid: 0, 1, 2"),
    ],
)
def test_what_a_card_cannot_say_is_refused(tmp_path, base, dataset, told):
    folder = _folder(tmp_path, _changed(**base), {**DATASET, **dataset})
    with pytest.raises(RequestError, match=told):
        card_from_nnunet(folder)


def test_channels_of_one_kind_become_steps_and_ignore_has_no_class(tmp_path):
    two = {
        "normalization_schemes": ["NoNormalization", "RGBTo01Normalization"],
        "use_mask_for_norm": [False] * 2,
    }
    dataset = {
        "channel_names": {"0": "nonorm", "1": "rgb_to_0_1"},
        "labels": {"background": 0, "sphere": 1, "ignore": 2},
    }
    card = card_from_nnunet(_folder(tmp_path, _changed(**two), dataset))
    assert card.input.bands == ["nonorm", "rgb_to_0_1"]
    assert [s.model_dump() for s in card.input.normalisation] == [{"op": "divide", "value": [1.0, 255.0]}]
    assert card.values == (0, 1)
    for scheme, op in (
        ("ZScoreNormalization", "scene_zscore"),
        ("RescaleTo01Normalization", "scene_quantiles"),
    ):
        plans = _changed(normalization_schemes=[scheme] * 2, use_mask_for_norm=[False] * 2)
        card = card_from_nnunet(_folder(tmp_path, plans, dataset))
        assert [s.op for s in card.input.normalisation] == [op]


def test_mistakes_name_the_field(trained):
    card = card_from_nnunet(trained)
    window = card.window.model_copy(update={"size": [24, 17, 32]})
    for changed, told in [
        (with_arguments(card, configuration="2d"), "found no configuration '2d'; valid: 3d_fullres, base"),
        (
            with_arguments(card, configuration="base"),
            "arguments.configuration: found 'base'; valid: '3d_fullres'",
        ),
        (with_arguments(card, folds=[7]), r"arguments.folds: found [7]; valid: a list of 0, 1"),
        (with_arguments(card, checkpoint="last"), "arguments.checkpoint: found 'last'; valid: final or best"),
        (with_arguments(card, mirror="yes"), "arguments.mirror: found 'yes'"),
        (with_arguments(card, tta=1), "arguments.tta: unknown"),
        (
            card.model_copy(update={"window": window}),
            "window.size: found [24, 17, 32]; valid: multiples of [4, 2, 4]",
        ),
        (
            card.model_copy(update={"classes": card.classes[:2]}),
            "classes: found values [0, 1]; valid: 0 backgr",
        ),
    ]:
        with pytest.raises(RequestError) as error:
            load_model(changed, "cpu", 1, "fp32")
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("conv_op", "os.system"), ("nonlin", "builtins.eval"), (None, "subprocess.Popen")]
)
def test_plans_cannot_name_other_classes(trained, tmp_path, key, value):
    plans = deepcopy(PLANS)
    architecture = plans["configurations"]["base"]["architecture"]
    if key is None:
        architecture["network_class_name"] = value
    else:
        architecture["arch_kwargs"][key] = value
    folder = _folder(tmp_path, plans, DATASET)
    (folder / "fold_0").symlink_to(trained / "fold_0")
    with pytest.raises(RequestError, match=f"plans.json: .*{value}"):
        check_card(card_from_nnunet(folder))

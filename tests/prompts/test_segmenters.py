"""Masks and predicted IoU are those of the library's own processor and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.prompts.segmenters.base import Prompt, mask_logits, stability_score
from segpipe.prompts.segmenters.registry import check_segmenter, load_segmenter
from segpipe.sources.base import Pixels, Scaling
from tests.prompts.tiny_sams import (
    NETWORKS,
    VIDEO_NETWORKS,
    Published,
    World,
    card_for,
    edge_of,
    iou,
    make_world,
    normalised,
    picture,
    points,
    published_medsam,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


BOX = {"box_xyxy": np.array([10.0, 12.5, 40.0, 50.0], np.float32)}
ONE = points((30, 20), labels=(1,))
PROMPTS = [
    Prompt(**ONE),
    Prompt(**points((30, 20), (5.5, 41.25), (50, 50), labels=(1, 0, 1))),
    Prompt(**BOX),
    Prompt(**BOX, **points((20, 30), (25, 45), labels=(1, 0))),
    Prompt(**points((12, 44), labels=(0,))),
    Prompt(box_xyxy=np.array([0.0, 0.0, 30.0, 8.0], np.float32)),
    Prompt(**BOX, **ONE),
]


@pytest.fixture(scope="module", params=list(NETWORKS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("multimask", [True, False])
def test_masks_are_the_librarys(world: World, multimask: bool) -> None:
    """Every prompt of one call, against the library asked for it alone; then with an embedding in float16."""
    segmenter, embedding = world.segmenter, world.embedding
    assert {name: a.shape for name, a in embedding.arrays.items()} == dict(check_segmenter(world.card))
    exact = segmenter.decode(embedding, PROMPTS, multimask=multimask)
    halved = segmenter.decode(embedding.half(), PROMPTS, multimask=multimask)
    assert exact.logits.shape == (7, 3 if multimask else 1, *segmenter.window)
    for i, prompt in enumerate(PROMPTS):
        masks, scores, low = world.published(prompt, multimask=multimask)
        scale = float(masks.abs().max())
        np.testing.assert_allclose(exact.logits[i], masks, atol=1e-4 * scale)
        np.testing.assert_allclose(exact.low[i], low, atol=1e-4 * scale)
        np.testing.assert_allclose(exact.iou[i], scores, atol=1e-4)
        assert iou(exact.logits[i] > 0, masks.numpy() > 0).min() > 0.999
    inside = (exact.logits > 0).mean((-2, -1))
    assert 0.05 < inside.mean() < 0.95 and exact.logits.std((0, 1)).mean() > 0.05
    kept = iou(exact.logits > 0, halved.logits > 0)
    moved = np.abs(exact.iou - halved.iou).max()
    print(
        f"{world.family}, masks per prompt {exact.iou.shape[1]}: IoU lost by float16 {1 - kept.mean():.1e}, "
        f"at most {1 - kept.min():.1e}; predicted IoU moves by at most {moved:.1e}"
    )
    assert kept.mean() > 0.99


def test_a_coarse_mask_is_a_prompt(world: World) -> None:
    """As logits of the model's own low resolution, alone and with a point."""
    mask = np.zeros(world.segmenter.window, bool)
    mask[8:30, 20:50] = True
    low = mask_logits(mask, world.segmenter.mask_shape)
    prompts = [Prompt(mask=low), Prompt(**ONE), Prompt(mask=low, **ONE), Prompt(mask=low, **BOX)]
    found = world.segmenter.decode(world.embedding, prompts)
    given = torch.from_numpy(low)[None, None]
    for i, prompt in enumerate(prompts):
        expected = world.published(prompt, given if prompt.mask is not None else None)[0]
        np.testing.assert_allclose(found.logits[i], expected, atol=1e-4 * float(expected.abs().max()))
    assert np.abs(found.logits[1] - found.logits[2]).max() > 0.01


def test_what_else_is_asked_changes_no_bit(world: World) -> None:
    """One by one, as on a CPU; in batches, on a CPU, none beyond the last ones: they depend on the place."""
    for segmenter, off in ((world.segmenter, 0.0), (load_segmenter(world.card, CPU, batch=4), 1e-5)):
        together = segmenter.decode(world.embedding, PROMPTS)
        turned = segmenter.decode(world.embedding, PROMPTS[::-1])
        scale = float(np.abs(together.logits).max())
        for i, prompt in enumerate(PROMPTS):
            alone = segmenter.decode(world.embedding, [prompt])
            np.testing.assert_allclose(alone.logits[0], together.logits[i], rtol=0, atol=off * scale)
            np.testing.assert_allclose(alone.iou[0], turned.iou[len(PROMPTS) - 1 - i], rtol=0, atol=off)
    assert segmenter.decode(world.embedding, []).logits.shape == (0, 3, *segmenter.window)


def test_windows_are_encoded_in_batches_too(world: World) -> None:
    other = np.ascontiguousarray(world.window[:, ::-1])
    first, second = world.segmenter.encode_batch(np.stack([world.window, other]))
    for batched, alone in ((first, world.embedding), (second, world.segmenter.encode(other))):
        for name, array in alone.arrays.items():
            np.testing.assert_allclose(batched.arrays[name], array, atol=1e-4 * np.abs(array).max())


def test_masks_of_an_earlier_answer_are_made_coarse_as_sam2_does() -> None:
    """Sam2Model resizes a large mask itself."""
    published = Published("sam2", tiny("sam2"))
    mask = picture(64)[..., 0] > 120
    whole = torch.from_numpy(np.where(mask, 10.0, -10.0).astype(np.float32))[None, None]
    low = torch.from_numpy(mask_logits(mask, (16, 16)))[None, None]
    prompt = Prompt(**ONE)
    torch.testing.assert_close(published(prompt, low)[0], published(prompt, whole)[0])


def test_the_encoder_alone_is_in_half_precision(tmp_path: Path) -> None:
    network = tiny("sam")
    network.save_pretrained(tmp_path / "net")
    card = card_for(tmp_path)
    window = normalised(card, picture(64))
    half = load_segmenter(card, CPU, precision="bf16").encode(window)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network.get_image_embeddings(torch.from_numpy(window)[None]).float()
    np.testing.assert_allclose(half.arrays["image"], expected[0], atol=1e-5)
    full = load_segmenter(card, CPU)
    assert 0 < np.abs(half.arrays["image"] - full.encode(window).arrays["image"]).max() < 1
    same = [s.decode(half, PROMPTS).logits for s in (full, load_segmenter(card, CPU, precision="bf16"))]
    assert np.array_equal(*same)


def test_medsam_is_sam_with_a_stretch_one_mask_and_probabilities_enlarged(tmp_path: Path) -> None:
    """As MedSAM_Inference.py of its repository: (x − min) / (max − min); sigmoid, then bilinear."""
    network = tiny("sam")
    network.save_pretrained(tmp_path / "net")
    card = card_for(
        tmp_path,
        input={"bands": ["ct"], "normalisation": [{"op": "scene_quantiles", "low": 0, "high": 1}]},
        arguments={"enlarge": "probabilities"},
    )
    scan = picture(64)[..., 0].astype(np.float32) * 7 - 900
    pair = ((float(scan.min()), float(scan.max())),)
    steps = Normaliser(card, (Scaling(),), Statistics((pair,)))
    window = steps.elementwise(Pixels(scan[None], np.ones((64, 64), bool)))
    segmenter = load_segmenter(card, CPU)
    found = segmenter.decode(segmenter.encode(window), [Prompt(**BOX)], multimask=False)

    expected = published_medsam(network, scan, BOX["box_xyxy"])
    probabilities = torch.from_numpy(found.logits[0, 0]).sigmoid()
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)
    assert 0.02 < float((expected > 0.5).float().mean()) < 0.98
    assert iou(found.logits[0, 0] > 0, expected.numpy() > 0.5) > 0.999


@pytest.mark.parametrize("name", VIDEO_NETWORKS)
def test_folders_of_video_models_hold_the_model_for_images(tmp_path: Path, name: str) -> None:
    torch.manual_seed(7)
    build, for_images = VIDEO_NETWORKS[name]
    network = build().eval()
    network.save_pretrained(tmp_path / "net")
    if name == "sam3_video":
        # As published: under the names of its own modules. save_pretrained of 5.23 doubles tracker_model.
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        save_file(state, tmp_path / "net" / "model.safetensors", metadata={"format": "pt"})
    card = card_for(tmp_path, name)
    segmenter = load_segmenter(card, CPU)
    window = normalised(card, picture(edge_of(name)))
    found = segmenter.decode(segmenter.encode(window), [Prompt(**ONE)])
    direct = for_images.from_pretrained(tmp_path / "net").eval()
    masks, scores, _ = Published(name, direct)(Prompt(**ONE))
    np.testing.assert_allclose(found.logits[0], masks, atol=1e-4 * float(masks.abs().max()))
    np.testing.assert_allclose(found.iou[0], scores, atol=1e-5)
    tracker = network.tracker_model if name == "sam3_video" else network
    ours, theirs = direct.mask_decoder.state_dict(), tracker.mask_decoder.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_stability_is_the_papers() -> None:
    """By hand on a ramp, and as the library's mask generator computes it."""
    ramp = np.tile(np.arange(-4.5, 5.5, dtype=np.float32), (3, 1))  # above 1: 4 of 10 columns; above −1: 6
    assert stability_score(ramp) == pytest.approx(4 / 6)
    assert np.isnan(stability_score(ramp - 100))
    from transformers.models.sam.image_processing_sam import _compute_stability_score

    logits = np.random.default_rng(0).normal(0.3, 2, (2, 3, 20, 30)).astype(np.float32)
    expected = _compute_stability_score(torch.from_numpy(logits), 0.0, 1)
    np.testing.assert_allclose(stability_score(logits), expected, rtol=1e-6)

"""Train a small land-cover U-Net on the west of one scene and score it on the east.

Only columns west of ``--split`` are read before training has ended: they give the normalisation
constants, the class weights and the training pixels. A first network is fitted without the
easternmost fifth of the west and scored on that strip, where the default settings were chosen among
ten; a second one, with the same settings, is fitted on the whole west, stored as float16, loaded
back from that file and scored once on the east. Both run for a fixed number of steps: no score
picks a checkpoint.

``python train.py landsat_multiband.tif strata.tif --out .`` writes weights.safetensors and
scores.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import segmentation_models_pytorch as smp
import torch
from rasterio.windows import Window
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CLASSES = ("developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment")
IGNORE = -1


def read(image: Path, labels: Path, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns start to stop: bands x rows x cols with NaN where invalid, and class indices."""
    with rasterio.open(image) as source:
        window = Window(start, 0, stop - start, source.height)
        pixels = source.read(window=window).astype(np.float32)
        invalid = (pixels == source.nodata).any(axis=0) | ~np.isfinite(pixels).all(axis=0)
    with rasterio.open(labels) as source:
        values = source.read(1, window=window)
    known = (values >= 1) & (values <= len(CLASSES)) & ~invalid
    pixels[:, invalid] = np.nan
    return pixels, np.where(known, values - 1, IGNORE).astype(np.int64)


def normalise(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """Standardise each band; invalid pixels become 0."""
    scaled = (pixels - mean[:, None, None]) / std[:, None, None]
    return torch.from_numpy(np.nan_to_num(scaled, nan=0.0).astype(np.float32))


def build(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained network and the arguments that smp.create_model needs to rebuild it."""
    spec: dict[str, Any] = {
        "arch": "Unet",
        "encoder_name": args.encoder,
        "encoder_weights": None,
        "encoder_depth": args.depth,
        "decoder_channels": list(args.decoder),
        "in_channels": 5,
        "classes": len(CLASSES),
    }
    return smp.create_model(**spec).to(memory_format=torch.channels_last), spec


def batch(
    image: torch.Tensor, target: torch.Tensor, args: argparse.Namespace, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops, each flipped, turned and with the gain and offset of its bands disturbed."""
    size, (bands, height, width) = args.crop, image.shape
    images, targets = [], []
    while len(images) < args.batch:
        row, col = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        y = target[row : row + size, col : col + size]
        if (y != IGNORE).float().mean() < 0.3:
            continue
        x = image[:, row : row + size, col : col + size]
        valid = (x != 0).any(dim=0)
        gain, offset = rng.normal(1, args.jitter, bands), rng.normal(0, args.jitter, bands)
        gain, offset = gain * rng.normal(1, args.jitter), offset + rng.normal(0, args.jitter)
        x = x * torch.from_numpy(gain).float()[:, None, None]
        x = (x + torch.from_numpy(offset).float()[:, None, None]) * valid
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        x, y = torch.rot90(x, turns, (1, 2)), torch.rot90(y, turns, (0, 1))
        images.append(x.flip(2) if flip else x)
        targets.append(y.flip(1) if flip else y)
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.stack(targets)


def class_weights(target: torch.Tensor, power: float, limit: float) -> torch.Tensor:
    """Inverse frequency to a power, relative to the commonest class and limited."""
    counts = torch.bincount(target[target != IGNORE], minlength=len(CLASSES)).float()
    return (counts.max() / counts.clamp(min=1)).pow(power).clamp(max=limit)


def fit(image: torch.Tensor, target: torch.Tensor, args: argparse.Namespace) -> nn.Module:
    """Train for a fixed number of steps; returns the moving average of the weights."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, _ = build(args)
    model.train()
    weights = class_weights(target, args.weight_power, args.weight_limit)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain}],
        lr=args.lr,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    running = 0.0
    for step in range(1, args.steps + 1):
        x, y = batch(image, target, args, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(
            logits.float(), y, weights, ignore_index=IGNORE, label_smoothing=args.smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        running += float(loss.detach())
        if step % 100 == 0:
            print(f"  step {step}/{args.steps} loss {running / 100:.3f}", flush=True)
            running = 0.0
    return average.module


@torch.inference_mode()
def predict(model: nn.Module, image: torch.Tensor) -> np.ndarray:
    """Class indices of a whole scene in one pass, padded at its trailing edges to the stride."""
    stride = int(model.encoder.output_stride)
    _, height, width = image.shape
    padded = F.pad(image, (0, -width % stride, 0, -height % stride))
    return model.eval()(padded[None])[0, :, :height, :width].argmax(dim=0).numpy()


def scores(reference: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Per-class IoU, its means, accuracy and the confusion matrix (rows are the reference)."""
    known = reference != IGNORE
    count = len(CLASSES)
    flat = reference[known] * count + predicted[known]
    matrix = np.bincount(flat, minlength=count * count).reshape(count, count)
    hit, pixels = np.diag(matrix), matrix.sum(axis=1)
    union = pixels + matrix.sum(axis=0) - hit
    iou = np.where(pixels > 0, hit / np.maximum(union, 1), np.nan)
    return {
        "classes": {
            name: {"iou": None if np.isnan(v) else round(float(v), 4), "reference_pixels": int(n)}
            for name, v, n in zip(CLASSES, iou, pixels, strict=True)
        },
        "miou_classes_with_reference": round(float(np.nanmean(iou)), 4),
        "miou_classes_of_1000_pixels": round(float(iou[pixels >= 1000].mean()), 4),
        "pixel_accuracy": round(float(hit.sum() / matrix.sum()), 4),
        "confusion_matrix": matrix.tolist(),
    }


def parse() -> argparse.Namespace:
    """Command-line arguments; the defaults are the settings of the stored weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("image", type=Path, help="five-band scene: blue, green, red, NIR, SWIR-1")
    add("labels", type=Path, help="class map on the same grid, values 1 to 7")
    add("--out", type=Path, default=Path(), help="folder for the weights and the scores")
    add("--validate-only", action="store_true", help="stop after the western strip; no east read")
    add("--split", type=float, default=0.6, help="share of the columns that form the west")
    add("--strip", type=float, default=0.2, help="eastern share of the west kept for validation")
    add("--encoder", default="tu-dla34", help="encoder name in segmentation_models_pytorch")
    add("--depth", type=int, default=3, help="encoder stages")
    add(
        "--decoder",
        type=int,
        nargs="+",
        default=[64, 48, 32],
        help="decoder channels, deepest first",
    )
    add("--steps", type=int, default=200, help="optimiser steps")
    add("--batch", type=int, default=8, help="crops in a step")
    add("--crop", type=int, default=128, help="side of a crop in pixels")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="AdamW weight decay of the kernels")
    add("--jitter", type=float, default=0.1, help="spread of the band gain and offset")
    add("--smoothing", type=float, default=0.05, help="label smoothing")
    add("--weight-power", type=float, default=0.25, help="exponent of the class weights")
    add("--weight-limit", type=float, default=10.0, help="largest class weight")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="random seed")
    return parser.parse_args()


def main() -> None:
    """Validate on the strip, fit on the west, store, and score the stored weights on the east."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    begun = time.monotonic()
    with rasterio.open(args.image) as source:
        width = source.width
    split = int(width * args.split)
    strip = int(split * (1 - args.strip))
    raw, target = read(args.image, args.labels, 0, split)
    mean = np.nanmean(raw, axis=(1, 2), dtype=np.float64).round(3)
    std = np.nanstd(raw, axis=(1, 2), dtype=np.float64).round(3)
    image, truth = normalise(raw, mean, std), torch.from_numpy(target)

    print(f"validation: fit on columns 0-{strip - 1}, score on {strip}-{split - 1}")
    trial = fit(image[:, :, :strip], truth[:, :strip], args)
    west = scores(target[:, strip:], predict(trial, image)[:, strip:])
    print(json.dumps({k: v for k, v in west.items() if k != "confusion_matrix"}))
    if args.validate_only:
        return

    print(f"final: fit on columns 0-{split - 1}")
    model = fit(image, truth, args)
    path = args.out / "weights.safetensors"
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    stored, spec = build(args)
    stored.load_state_dict(load_file(path))
    minutes = round((time.monotonic() - begun) / 60, 2)
    raw, target = read(args.image, args.labels, 0, width)
    east = scores(target[:, split:], predict(stored, normalise(raw, mean, std))[:, split:])
    report = {
        "model": spec,
        "output_stride": int(stored.encoder.output_stride),
        "normalisation": {"mean": mean.tolist(), "std": std.tolist()},
        "weights": {"bytes": path.stat().st_size, "storage": "float16"},
        "columns": {"validation_fit": [0, strip], "west": [0, split], "east": [split, width]},
        "east": east,
        "west_validation": west,
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "training_minutes": minutes,
        "torch": torch.__version__,
        "smp": smp.__version__,
    }
    (args.out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

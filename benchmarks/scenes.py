"""Synthetic scenes of any size, and networks to run over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio
import torch
import yaml
from rasterio.windows import Window
from safetensors.torch import save_file

STRIPE = 512
"""Rows written at once."""


def raster(path: Path, size: int, bands: int, dtype: str = "uint16") -> str:
    """A square tiled GeoTIFF of patches and noise, written stripe by stripe."""
    rng = np.random.default_rng(0)
    profile: dict[str, Any] = {
        "driver": "GTiff", "width": size, "height": size, "count": bands, "dtype": dtype,
        "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5200000),
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1,
        "predictor": 2, "bigtiff": "if_safer",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        for band in range(1, bands + 1):
            target.set_band_description(band, f"b{band}")
        for row in range(0, size, STRIPE):
            rows = min(STRIPE, size - row)
            coarse = rng.integers(20, 180, (bands, rows // 32 + 1, size // 32 + 1))
            values = coarse.repeat(32, 1).repeat(32, 2)[:, :rows, :size]
            values = values + rng.integers(0, 40, (bands, rows, size))
            target.write(values.astype(dtype), window=Window(0, row, size, rows))
    return str(path)


def volume(path: Path, shape: tuple[int, int, int]) -> str:
    """A NIfTI volume (i, j, k) of patches and noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 900, tuple(n // 16 + 1 for n in shape)).astype(np.int16)
    values = coarse.repeat(16, 0).repeat(16, 1).repeat(16, 2)[tuple(slice(0, n) for n in shape)]
    values = values + rng.integers(0, 100, shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.0, 1.0])), path)
    return str(path)


def _classes(count: int) -> list[dict[str, Any]]:
    return [{"value": i, "name": f"class {i}", "color": f"#{40 * i:02x}8040"} for i in range(count)]


def unet_card(folder: Path, bands: int, classes: int = 5) -> str:
    """U-Net on ResNet-18, random weights, windows of 512 with a halo of 64."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    network = smp.create_model("unet", "resnet18", encoder_weights=None, in_channels=bands, classes=classes)
    save_file(network.state_dict(), folder / "unet.safetensors")
    names = [f"b{i}" for i in range(1, bands + 1)]
    steps = [{"op": "subtract", "value": [100] * bands}, {"op": "divide", "value": [50] * bands}]
    card = {
        "name": "unet-resnet18", "kind": "raster", "provider": "smp", "architecture": "Unet",
        "arguments": {"encoder_name": "resnet18"}, "weights": "unet.safetensors",
        "input": {"bands": names, "normalisation": steps},
        "window": {"size": [512], "halo": [64], "stride": 32}, "classes": _classes(classes),
    }  # fmt: skip
    return _write(folder / "unet.yaml", card)


def volume_card(folder: Path) -> str:
    """The 3D U-Net of MONAI's spleen tutorial, random weights, windows of 96³ with a halo of 16."""
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    arguments = {
        "spatial_dims": 3, "channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2],
        "num_res_units": 2, "norm": "batch",
    }  # fmt: skip
    network = UNet(in_channels=1, out_channels=3, **arguments)
    save_file(network.state_dict(), folder / "unet3d.safetensors")
    steps = [{"op": "subtract", "value": [500]}, {"op": "divide", "value": [300]}]
    card = {
        "name": "unet-3d", "kind": "volume", "provider": "monai", "architecture": "UNet",
        "arguments": arguments, "weights": "unet3d.safetensors", "input": {"normalisation": steps},
        "window": {"size": [96], "halo": [16], "stride": 16}, "classes": _classes(3),
    }  # fmt: skip
    return _write(folder / "unet3d.yaml", card)


def tiny_card(folder: Path, ndim: int) -> str:
    """One convolution: all time and memory are the pipeline's own."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d if ndim == 2 else torch.nn.Conv3d
    torch.jit.script(conv(1, 3, 3, padding=1).eval()).save(str(folder / f"tiny{ndim}.pt"))
    card = {
        "name": f"tiny-{ndim}d", "kind": "raster" if ndim == 2 else "volume", "provider": "torchscript",
        "allow_torchscript": True, "weights": f"tiny{ndim}.pt",
        "input": {"bands": ["b1"] if ndim == 2 else []},
        "window": {"size": [512] if ndim == 2 else [64], "halo": [8], "stride": 8},
        "classes": _classes(3),
    }  # fmt: skip
    return _write(folder / f"tiny{ndim}.yaml", card)


def _write(path: Path, card: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(card))
    return str(path)

"""The ONNX U-Nets of ukis-csmask as model cards, against that package's own class and real references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from sklearn.metrics import cohen_kappa_score

from segpipe.config.card import read_card
from segpipe.config.job import Job, load_job
from segpipe.inference.settings import resolve_settings
from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.sources import SceneRef

csmask = pytest.importorskip("ukis_csmask.mask", reason="ukis-csmask is not installed")

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "cloud_scenes"
BANDS = ["blue", "green", "red", "nir", "swir16", "swir22"]
COUNTS = {"cloud-6band": 6, "cloud-4band": 4}
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the cloud scenes are not at {DATA}")


def image(scene: str) -> np.ndarray:
    with rasterio.open(DATA / f"{scene}_toa.tif") as source:
        return source.read()


def truth(scene: str) -> np.ndarray:
    """0 clear, 1 cloud, 2 shadow: the package's own test maps 4 to cloud and 0 to shadow."""
    with rasterio.open(DATA / f"{scene}_mask.tif") as source:
        mask = source.read(1)
    return np.select([mask == 4, mask == 0], [1, 2], 0)


def segment(path: Path, card: str, out: Path, **keys: object) -> np.ndarray:
    """Labels of a scene by the card, under the cloud job's settings or those given."""
    settings = load_job("configs/jobs/cloud-mask.yaml").model_dump(include={"tiling", "compute"})
    job = Job.model_validate(
        {
            "scenes": [str(path)],
            "model": f"configs/models/{card}.yaml",
            "bands": BANDS,
            "outputs": {"dir": str(out)},
            **settings,
            **keys,
        }
    )
    resolved = resolve_settings(job.compute, read_card(str(job.model)))
    scene = create_stages(prepare_scene(job, read_card(job.model), SceneRef(path.stem, str(path)), resolved))
    predict_blocks(scene, pending_blocks(scene))
    return np.asarray(scene.predict.array("labels")[...])


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "card"),
    [
        ("landsat7", "cloud-4band"),
        ("landsat7", "cloud-6band"),
        ("sentinel2", "cloud-4band"),
        ("sentinel2", "cloud-6band"),
    ],
)
def test_kappa_is_at_least_the_packages_own(scene: str, card: str, tmp_path: Path) -> None:
    bands = BANDS[: COUNTS[card]]
    pixels = np.ascontiguousarray(image(scene)[: len(bands)].transpose(1, 2, 0))
    theirs = csmask.CSmask(pixels, bands, providers=["CPUExecutionProvider"]).csm[..., 0]
    ours = segment(DATA / f"{scene}_toa.tif", card, tmp_path)
    reference = truth(scene).ravel()
    package = cohen_kappa_score(reference, theirs.ravel())
    kappa = cohen_kappa_score(reference, ours.ravel())
    print(f"{scene} {card}: kappa {kappa:.4f}, the package's own {package:.4f}, "
          f"pixels alike {np.mean(ours == theirs):.4f}")  # fmt: skip
    assert kappa >= package
    assert np.mean(ours == theirs) > 0.95


@needs_data
@pytest.mark.parametrize("card", list(COUNTS))
def test_the_same_window_gives_the_same_pixels(card: str, tmp_path: Path) -> None:
    """One window of 256²: the package's session on its own normalisation, pixel by pixel."""
    bands = BANDS[: COUNTS[card]]
    corner = image("sentinel2")[:, 100:356, 200:456]
    path = tmp_path / "corner.tif"
    profile = {"driver": "GTiff", "width": 256, "height": 256, "count": 6, "dtype": "float32"}
    with rasterio.open(path, "w", **profile) as target:
        target.write(corner)
    pixels = np.ascontiguousarray(corner[: len(bands)].transpose(1, 2, 0))
    package = csmask.CSmask(pixels.copy(), bands, providers=["CPUExecutionProvider"])
    normal = csmask.CSmask.normalize(pixels.copy(), package.band_mean, package.band_std)
    logits = package.session.run(None, {package.input_names: normal.transpose(2, 0, 1)[None]})[0]
    ours = segment(path, card, tmp_path / "out", tiling={}, compute={"tta": "none"})
    # On as many threads as there are here, which the package leaves open: ties but for rounding are left out.
    ordered = np.sort(logits[0], axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5 * np.abs(logits).max()
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(ours[clear], logits[0].argmax(0)[clear])

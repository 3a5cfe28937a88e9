"""A CT series in files, oblique and shuffled, of a patient whose data must not get about."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from world import World

from segpipe.config.card import Card, load_card

CT = Path(__file__).parents[2].parent / "shared" / "data" / "totalsegmentator_ct" / "dicom"
needs_ct = pytest.mark.skipif(not CT.exists(), reason=f"TotalSegmentator's example CT is not at {CT}")

SECRETS = ("Müller", "SECRET-4711", "19991399", "ACC-0815", "geheim")


def write_slice(path: Path, pixels: np.ndarray, uids: dict[str, Any], **tags: Any) -> str:
    """One CT slice of a patient with a name beyond ASCII, a birth date that is none and an odd sex."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = Dataset()
    ds.file_meta, ds.SpecificCharacterSet = meta, "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.PatientName, ds.PatientID = SECRETS[:2]
        ds.PatientBirthDate, ds.AccessionNumber, ds.PatientSex = SECRETS[2:]
    ds.Modality, ds.SeriesNumber, ds.StudyDate = "CT", 4, "20240102"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.PixelSpacing = [0.8, 0.5]
    ds.SliceThickness = 9
    ds.PixelData = pixels.astype("<u2").tobytes()
    for keyword, value in {**uids, **tags}.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return str(ds.SOPInstanceUID)


ROW, COLUMN = np.array([0.8, 0.6, 0.0]), np.array([-0.36, 0.48, 0.8])
"""Direction cosines of an oblique series, LPS."""
FIRST = np.array([1.0, 2.0, 3.0])
STEP = 2.5


def write_oblique(folder: Path, volume: np.ndarray, uids: dict[str, Any], *, tilt: float = 0.0) -> list[str]:
    """An oblique volume (z, y, x) in shuffled files; SOP instances in the order of z."""
    order = np.random.default_rng(3).permutation(len(volume))
    found = []
    for k, plane in enumerate(volume):
        position = FIRST + STEP * k * np.cross(ROW, COLUMN) + tilt * k * COLUMN
        found.append(
            write_slice(
                folder / f"{order[k]:03d}.dcm",
                plane,
                uids,
                ImagePositionPatient=[round(float(v), 9) for v in position],
                ImageOrientationPatient=[*ROW.tolist(), *COLUMN.tolist()],
            )
        )
    return found


def volume_card(world: World) -> Card:
    return load_card(world.models / "nearest-volume.yaml")

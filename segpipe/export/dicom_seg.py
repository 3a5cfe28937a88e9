"""Label maps as DICOM SEG, beside the series that was segmented and referring to it.

Segments are BINARY, one bit a voxel without compression: what every reader takes. (RLE does not exist for
single bits, and label map segmentations are younger than most readers.) Frames without an element of their
segment are left out.

The standard has a segmentation repeat the tags of patient and study of its source; they are copied from the
first slice and never read by anything else here: no message, no warning and no file name says them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from highdicom import UID, AlgorithmIdentificationSequence
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr.coding import CodedConcept
from PIL.ImageColor import getrgb
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import Collection, codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from segpipe import __version__
from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.staging import commit, slab_boxes, staging
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.sources.base import LabelReader, Source
from segpipe.sources.dicom.series import DICOM_ERRORS, DicomSlice

N = TypeVar("N", int, float)
PRIVATE = "99SEGPIPE"
"""Coding scheme of classes whose card names no concept: the code is made from the class's name."""
ANATOMICAL = codes.SCT.AnatomicalStructure
_CATEGORIES = (
    (ANATOMICAL, codes.cid7192),
    (codes.SCT.Tissue, codes.cid7191),
    (codes.SCT.MorphologicallyAbnormalStructure, codes.cid7194),
    (codes.SCT.PhysicalObject, codes.cid7193),
    (codes.SCT.Function, codes.cid7195),
    (codes.SCT.SpatialAndRelationalConcept, codes.cid7196),
    (codes.SCT.BodySubstance, codes.cid7197),
    (codes.SCT.Substance, codes.cid7198),
)
"""Categories of segments and the property types that the standard lists under each (PS3.16, CID 7150)."""
LONGEST = 64
"""Characters of a long string (LO) of DICOM."""
SERIES_NUMBER = 1000
"""Added to the source's, so that a viewer lists the segmentation behind what was acquired."""


@dataclass(frozen=True)
class Algorithm:
    """What drew the labels."""

    name: str
    version: str
    automatic: bool
    """False: somebody had a hand in it, or it is not known."""
    learned: bool = True
    """Whether it is known to be a trained model."""


def write_dicom_seg(
    labels: LabelReader,
    source: Source,
    classes: Sequence[Class],
    nodata: int,
    algorithm: Algorithm,
    path: Path,
) -> None:
    """Write a label map as one DICOM SEG, atomically: a segment for each class that is no background.

    Frame and slice of the series are matched by the place in space that both have. UIDs of the file are new
    with every writing, as the standard wants for whatever may differ in a byte.

    Memory: the label map goes through a file on disk (a byte an element, two from 256 segments on), slab by
    slab. The library holds the encoded frames twice, an eighth of a byte per element each, and 4 KB of Python
    objects per frame: 200 MB for ten organs of 300 slices of 512², in proportion to segments x slices with an
    element of them. Its dictionaries take 110 MB once.

    Args:
        labels: windowed reader; called with whole slabs along z, in order.
        source: the open series, which has all UIDs (`segpipe.sources.dicom.series.require_uids`).
        classes: values, names, colours and codes; those of background are no segments.
        nodata: the value of voxels without a label; no segment's.
        algorithm: what drew the labels.
        path: local file.

    Raises:
        SceneError: a label is none of the classes, there is no class but background, or the series cannot be
            read.
    """
    segments = [c for c in classes if not c.background]
    if not segments:
        raise SceneError(f"{path}: no class but background; a DICOM SEG needs at least one segment")
    with staging(path) as folder:
        numbers = _segment_numbers(labels, source, classes, nodata, folder / "segments")
        patient = _first_header(source.slices[0])
        seg = Segmentation(
            source_images=_anonymous_headers(source, patient),
            pixel_array=numbers,
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=[_described(n, c, algorithm) for n, c in enumerate(segments, start=1)],
            series_instance_uid=UID(),
            series_number=SERIES_NUMBER + _number(patient, "SeriesNumber", int),
            sop_instance_uid=UID(),
            instance_number=1,
            manufacturer="segpipe",
            manufacturer_model_name=algorithm.name[:LONGEST],
            software_versions=__version__,
            device_serial_number=__version__,
            content_label="SEGPIPE",
            content_description=f"labels of {algorithm.name}"[:LONGEST],
            series_description=f"segpipe {algorithm.name}"[:LONGEST],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            coding_schemes=[
                CodingSchemeIdentificationItem(PRIVATE, name="Classes of segpipe's models, by name")
            ],
            specific_character_set="ISO_IR 192",
        )  # fmt: skip
        _copy_patient(seg, patient, source.slices[0].path)
        draft = folder / "draft"
        seg.save_as(draft)
        commit(draft, path)


def _segment_numbers(
    labels: LabelReader, source: Source, classes: Sequence[Class], nodata: int, path: Path
) -> np.memmap:
    """The label map (z, y, x) in a file, as numbers of segments from 1; 0 is none.

    Raises:
        SceneError: a label is none of the classes.
    """
    segments = [c.value for c in classes if not c.background]
    dtype = np.uint8 if len(segments) <= np.iinfo(np.uint8).max else np.uint16
    known = np.array(sorted({nodata, *(c.value for c in classes)}))
    number = {value: n for n, value in enumerate(segments, start=1)}
    renamed = np.array([number.get(value, 0) for value in known.tolist()], dtype=dtype)
    shape = source.geometry.shape
    found = np.memmap(path, dtype, "w+", shape=shape)
    for box in slab_boxes(shape, np.dtype(np.int64).itemsize):
        slab = np.asarray(labels(box))
        at = np.searchsorted(known, slab).clip(max=len(known) - 1)
        if (strange := slab != known[at]).any():
            raise SceneError(
                f"{source.uri}: a label at {box} is {slab[strange][0]}; valid: {', '.join(map(str, known))}"
            )
        found[box.slices] = renamed[at]
    return found


def _first_header(first: DicomSlice) -> Dataset:
    """All tags of the first slice but its pixels, as text: patient and study among them.

    Raises:
        SceneError: they cannot be decoded; says of which file, not what they are.
    """
    try:
        header = dcmread(first.path, stop_before_pixels=True)
        header.decode()
    except DICOM_ERRORS as error:
        raise SceneError(f"{first.path}: tags cannot be read ({type(error).__name__})") from None
    return header


def _anonymous_headers(source: Source, patient: Dataset) -> list[Dataset]:
    """What the library needs of each slice, in the volume's order: UIDs and places, nothing of a patient.

    Orientation and pixel spacing are those of the first slice, as in the scene's affine.
    """
    assert isinstance(source.geometry, VolumeGeometry)
    first, affine = source.slices[0], source.geometry.matrix
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    # RAS to LPS: x and y change sign.
    step = abs(float(affine[:3, 2] * (-1, -1, 1) @ normal / np.linalg.norm(normal)))
    headers = []
    for s in source.slices:
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = s.sop_class, s.sop_instance
        header.StudyInstanceUID, header.SeriesInstanceUID = s.study, s.series
        header.FrameOfReferenceUID = s.frame_of_reference
        header.PositionReferenceIndicator = str(patient.get("PositionReferenceIndicator") or "")
        header.Modality = s.modality
        header.Rows, header.Columns = s.shape
        header.PixelSpacing = list(first.spacing)
        header.ImagePositionPatient = list(s.position)
        header.ImageOrientationPatient = list(first.orientation)
        header.SliceThickness = _number(patient, "SliceThickness", float) or step
        header.SpacingBetweenSlices = step
        for keyword in _BLANK:
            setattr(header, keyword, "")
        headers.append(header)
    return headers


_BLANK = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""What the library asks of a source, and tells where it finds fault with it: `_copy_patient` has it."""


def _copy_patient(seg: Segmentation, patient: Dataset, path: str) -> None:
    """The modules of patient and study, as the source has them.

    Raises:
        SceneError: a tag cannot be copied; says of which file, not what it is.
    """
    try:
        seg.copy_patient_and_study_information(patient)
    except DICOM_ERRORS as error:
        raise SceneError(f"{path}: tags of patient or study are damaged ({type(error).__name__})") from None


def _described(number: int, c: Class, algorithm: Algorithm) -> SegmentDescription:
    """A segment: what it is, in codes, and who drew it."""
    category, concept = concept_of(c)
    kinds = SegmentAlgorithmTypeValues
    family = (
        codes.cid7162.ArtificialIntelligence if algorithm.learned else Code("unknown", PRIVATE, "Not known")
    )
    described = SegmentDescription(
        segment_number=number,
        segment_label=c.name[:LONGEST],
        segmented_property_category=category,
        segmented_property_type=concept,
        algorithm_type=kinds.AUTOMATIC if algorithm.automatic else kinds.SEMIAUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm.name[:LONGEST], family=family, version=algorithm.version[:LONGEST]
        ),
        display_color=CIELabColor.from_rgb(*getrgb(c.color)),
    )
    described.SegmentDescription = f"value {c.value} in label maps"
    return described


def concept_of(c: Class) -> tuple[CodedConcept, CodedConcept]:
    """Category and type of a class: its card's concept, or one of the private scheme.

    A coded class has the category under which the standard lists its code, and is an anatomical structure
    where it lists it nowhere. A class without a code is said to be no more than a class.
    """
    meaning = c.name[:LONGEST]
    scheme, mark, value = (c.code or "").partition(":")
    if not (scheme and mark and value):
        name = hashlib.sha256(c.name.encode()).hexdigest()[:12]
        return CodedConcept("class", PRIVATE, "Class of a model"), CodedConcept(name, PRIVATE, meaning)
    listed = (k for k, types in _CATEGORIES if (scheme, value) in _codes_of(types))
    return CodedConcept.from_code(next(listed, ANATOMICAL)), CodedConcept(value, scheme, meaning)


@cache
def _codes_of(collection: Collection) -> frozenset[tuple[str, str]]:
    """(scheme, value) of a context group's codes."""
    return frozenset((c.scheme_designator, c.value) for c in collection.concepts.values())


def _number(header: Dataset, keyword: str, kind: type[N]) -> N:
    """A tag of the source; 0 where it has none, none that is a number, or one below 0."""
    try:
        return max(kind(0), kind(header.get(keyword) or 0))
    except (TypeError, ValueError):
        return kind(0)

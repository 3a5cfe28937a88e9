"""The slices of a DICOM series: which files belong, in what order, and where they lie.

Nothing here keeps or repeats what names or describes a patient: notes and errors speak of files,
counts and geometry only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID

from segpipe.errors import SceneError
from segpipe.sources.base import reason
from segpipe.sources.uri import DICOM_SUFFIXES

HEADER_TAGS = [
    "ImageType", "Modality", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "PixelRepresentation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "ModalityLUTSequence",
]  # fmt: skip
"""All that is read of a header: no patient module among them."""

NOT_SCENES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC")
"""Modalities of objects that lie beside a series and are made from it."""

DICOM_ERRORS = (
    InvalidDicomError, BytesLengthException, OSError, EOFError, ValueError, TypeError, KeyError,
    AttributeError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What pydicom and its decoders raise at damaged or unusual files."""

_UIDS = {
    "SOPClassUID": "sop_class", "SOPInstanceUID": "sop_instance", "StudyInstanceUID": "study",
    "SeriesInstanceUID": "series", "FrameOfReferenceUID": "frame_of_reference",
}  # fmt: skip
"""What a reference to a series is made of, and the fields of `DicomSlice` that hold it."""

SAME_DIRECTION = 1e-3
"""Greatest difference of direction cosines within one series."""


@dataclass(frozen=True)
class DicomSlice:
    """The header of one image file."""

    path: str
    sop_class: str
    """SOPClassUID; this and the other UIDs may be empty, as some anonymisers leave them."""
    sop_instance: str
    """SOPInstanceUID"""
    study: str
    """StudyInstanceUID"""
    series: str
    """SeriesInstanceUID"""
    frame_of_reference: str
    modality: str
    shape: tuple[int, int]
    """(rows, columns)"""
    spacing: tuple[float, float]
    """PixelSpacing in mm: (between rows, between columns)."""
    position: tuple[float, ...]
    """Centre of the first pixel, LPS mm."""
    orientation: tuple[float, ...]
    """Direction cosines, LPS: of growing column index, then of growing row index."""
    dtype: np.dtype[Any]
    rescale: tuple[float, float]
    """(slope, intercept)"""
    inverted: bool
    """MONOCHROME1: small values are bright."""
    padding: bool
    """Whether a padding value is declared."""
    transfer_syntax: str


def read_series(folder: Path, series: str | None = None) -> tuple[list[DicomSlice], list[str]]:
    """The image slices of a folder, which must be of one series; and notes.

    Args:
        folder: whose files are read.
        series: leave out all but this one: ``UID``, or ``UID@FRAME`` with its frame of reference.

    Raises:
        SceneError: none or several series, a damaged or multi-frame file, or slices that differ
            in size, pixel spacing or orientation.
    """
    slices: list[DicomSlice] = []
    left_out: Counter[str] = Counter()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
        header = read_header(path)
        if header is not None and series is not None and not _belongs(header, series):
            continue
        why = not_a_slice(path, header)
        if header is None or why:
            left_out[why] += 1
        else:
            slices.append(_slice(path, header))
    if not slices:
        raise SceneError(f"{folder}: no DICOM image slices{_listed(left_out)}")
    _require_one_series(folder, slices)
    _require_same(slices)
    notes = [f"left out files that are no image slices{_listed(left_out)}"] if left_out else []
    return slices, notes


def in_order(slices: Sequence[DicomSlice]) -> list[DicomSlice]:
    """Sorted along the normal of the slices, row cosines x column cosines."""
    normal = _normal(slices[0])
    return sorted(slices, key=lambda s: (float(np.dot(s.position, normal)), s.path))


def series_affine(folder: Path, slices: Sequence[DicomSlice]) -> np.ndarray:
    """Voxel centre (i = column, j = row, k = slice) to RAS mm, (4, 4), of slices in order.

    The step between slices is measured on their positions, never taken from SliceThickness or
    SpacingBetweenSlices; a tilted gantry stays in it as shear.

    Raises:
        SceneError: fewer than two slices, two at one place, a gap, or uneven steps (beyond 1 % of
            the spacing or 0.01 mm, whichever is larger).
    """
    if len(slices) < 2:
        raise SceneError(f"{folder}: one slice only, so the distance between slices is unknown")
    positions = np.array([s.position for s in slices], dtype=np.float64)
    _require_even(folder, slices, positions @ _normal(slices[0]))
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    expected = positions[0] + step * np.arange(len(slices))[:, np.newaxis]
    errors = np.linalg.norm(positions - expected, axis=1)
    if errors.max() > _tolerance(float(np.linalg.norm(step))):
        worst = slices[int(errors.argmax())]
        raise SceneError(f"{worst.path}: lies {errors.max():.3g} mm beside the line of the other slices")
    first = slices[0]
    lps = np.eye(4)
    # PixelSpacing is (between rows, between columns): the second goes with the column index i.
    lps[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    lps[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps + 0.0  # + 0.0 turns -0.0 into 0.0


def tilted(slices: Sequence[DicomSlice]) -> bool:
    """Whether the slices are shifted against each other (gantry tilt)."""
    step = np.array(slices[-1].position) - np.array(slices[0].position)
    return bool(np.linalg.norm(np.cross(step / np.linalg.norm(step), _normal(slices[0]))) > 1e-3)


def require_uids(folder: str, slices: Sequence[DicomSlice]) -> None:
    """Refuse a series that nothing can refer to: what is written beside it names its UIDs.

    Raises:
        SceneError: UIDs are missing, an SOP instance stands twice, or slices are of several studies or
            frames of reference; says which.
    """
    help_ = "leave dicomseg out of outputs.formats, or give the series its UIDs"
    missing = [
        f"{keyword} in {count} of {len(slices)} slices"
        for keyword, field in _UIDS.items()
        if (count := sum(not getattr(s, field) for s in slices))
    ]
    if missing:
        raise SceneError(f"{folder}: a DICOM SEG needs UIDs; missing: {', '.join(missing)}; {help_}")
    for s in slices:
        if UID(s.sop_class).type != "SOP Class":
            raise SceneError(f"{s.path}: SOPClassUID {s.sop_class} is none of the standard's; {help_}")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if (count := len({getattr(s, _UIDS[keyword]) for s in slices})) > 1:
            raise SceneError(f"{folder}: found {count} values of {keyword}; valid: one; {help_}")
    instance, count = Counter(s.sop_instance for s in slices).most_common(1)[0]
    if count > 1:
        raise SceneError(
            f"{folder}: found SOPInstanceUID {instance} in {count} slices; valid: one each; {help_}"
        )


def read_header(path: Path) -> Dataset | None:
    """The tags we read of a file; None where it is not DICOM.

    Raises:
        SceneError: it is called DICOM by its suffix, but cannot be read: leaving it out could
            shorten the volume unseen.
    """
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))
        list(header)  # pydicom looks at a value when it is asked for: what is damaged raises here
        return header
    except DICOM_ERRORS as error:
        if path.name.lower().endswith(DICOM_SUFFIXES):
            raise SceneError(f"{path}: cannot be read as DICOM: {reason(error)}") from error
        return None


def group_files(folder: Path, names: Sequence[str]) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """The files of a folder that hold slices by `series_of`, and those that ought to and cannot be read."""
    groups: dict[tuple[str, str], list[str]] = {}
    broken: list[str] = []
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        try:
            header = read_header(path)
            if header is not None and not not_a_slice(path, header):
                groups.setdefault(series_of(header), []).append(name)
        except SceneError:
            broken.append(name)
    return groups, broken


def series_of(header: Dataset) -> tuple[str, str]:
    """(SeriesInstanceUID, FrameOfReferenceUID) of a file, empty where it has none."""
    return str(header.get("SeriesInstanceUID") or ""), str(header.get("FrameOfReferenceUID") or "")


def _belongs(header: Dataset, series: str) -> bool:
    """Whether a file is of a series ``UID`` or ``UID@FRAME``."""
    uid, mark, frame = series.partition("@")
    found = series_of(header)
    return found == (uid, frame) if mark else found[0] == uid


def not_a_slice(path: Path, header: Dataset | None) -> str:
    """Why a file is no slice of a scene; empty if it is one.

    Raises:
        SceneError: an enhanced (multi-frame) image, which this version cannot read.
    """
    if header is None:
        return "not DICOM"
    modality = str(header.get("Modality") or "")
    if modality in NOT_SCENES:
        return modality
    if not header.get("Rows") or not header.get("Columns"):
        return "no pixels"
    if any(str(v).upper() == "LOCALIZER" for v in header.get("ImageType") or ()):
        return "localizer"
    if _number(path, header, "NumberOfFrames", 1) > 1:
        raise SceneError(
            f"{path}: a multi-frame (enhanced) image of {header.NumberOfFrames} frames, not "
            "supported yet; convert it to NIfTI or to single-frame DICOM"
        )
    grey = str(header.get("PhotometricInterpretation") or "").startswith("MONOCHROME")
    return "" if grey and _number(path, header, "SamplesPerPixel", 1) == 1 else "colour"


def _slice(path: Path, header: Dataset) -> DicomSlice:
    """What we need of a header.

    Raises:
        SceneError: position, orientation or pixel spacing is missing or makes no sense.
    """
    orientation = _numbers(path, header, "ImageOrientationPatient", 6)
    rows, columns = np.array(orientation[:3]), np.array(orientation[3:])
    skew = abs(float(rows @ columns))
    if skew > SAME_DIRECTION or abs(np.linalg.norm([rows, columns], axis=1) - 1).max() > 1e-2:
        raise SceneError(f"{path}: ImageOrientationPatient {orientation} are no direction cosines")
    between_rows, between_columns = _numbers(path, header, "PixelSpacing", 2)
    if between_rows <= 0 or between_columns <= 0:
        raise SceneError(f"{path}: PixelSpacing is {between_rows} and {between_columns} mm")
    if header.get("ModalityLUTSequence"):
        raise SceneError(f"{path}: values go through a modality look-up table, not supported")
    bits = _number(path, header, "BitsAllocated", 0)
    if bits not in (8, 16, 32):
        raise SceneError(f"{path}: {bits:g} bits per pixel; expected 8, 16 or 32")
    signed = _number(path, header, "PixelRepresentation", 0) == 1
    return DicomSlice(
        path=str(path),
        **{field: str(header.get(keyword) or "") for keyword, field in _UIDS.items()},
        modality=str(header.get("Modality") or "image"),
        shape=(int(_number(path, header, "Rows", 0)), int(_number(path, header, "Columns", 0))),
        spacing=(between_rows, between_columns),
        position=_numbers(path, header, "ImagePositionPatient", 3),
        orientation=orientation,
        dtype=np.dtype(f"{'int' if signed else 'uint'}{bits:.0f}"),
        rescale=(_number(path, header, "RescaleSlope", 1.0), _number(path, header, "RescaleIntercept", 0.0)),
        inverted=header.PhotometricInterpretation == "MONOCHROME1",
        padding=header.get("PixelPaddingValue") is not None,
        transfer_syntax=str(getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ""),
    )


def _number(path: Path, header: Dataset, keyword: str, absent: float) -> float:
    """An element with one value as a number; ``absent`` where there is none.

    Raises:
        SceneError: it is no number.
    """
    try:
        value = header.get(keyword)
        return absent if value is None or value == "" else float(value)
    except DICOM_ERRORS as error:
        raise SceneError(f"{path}: {keyword} is damaged") from error


def _numbers(path: Path, header: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """A multi-valued element as floats.

    Raises:
        SceneError: it is missing, has another number of values, or one that is not finite.
    """
    try:
        values = tuple(float(v) for v in header.get(keyword) or ())
    except DICOM_ERRORS as error:
        raise SceneError(f"{path}: {keyword} is damaged") from error
    if len(values) != count or not np.isfinite(values).all():
        raise SceneError(f"{path}: {keyword} has {len(values)} values, expected {count} numbers")
    return values


def _require_one_series(folder: Path, slices: Sequence[DicomSlice]) -> None:
    groups: dict[tuple[object, ...], list[DicomSlice]] = {}
    for s in slices:
        direction = tuple(round(v, 2) + 0.0 for v in s.orientation)
        key = (s.series, s.frame_of_reference) if s.series else ("", s.frame_of_reference, direction, s.shape)
        groups.setdefault(key, []).append(s)
    if len(groups) == 1:
        return
    parts = [
        f"{g[0].modality} {len(g)} x {g[0].shape[0]}x{g[0].shape[1]} from {Path(g[0].path).name}"
        for g in groups.values()
    ]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    raise SceneError(
        f"{folder}: holds {len(groups)} series ({'; '.join(parts[:6])}{more}); "
        "put each into a folder of its own, or name one: folder#series=SeriesInstanceUID"
    )


def _require_same(slices: Sequence[DicomSlice]) -> None:
    """Refuse slices that do not stack."""
    first = slices[0]
    for s in slices[1:]:
        turned = float(np.abs(np.subtract(s.orientation, first.orientation)).max())
        if s.shape != first.shape:
            what = f"is {s.shape[0]}x{s.shape[1]}, not {first.shape[0]}x{first.shape[1]}"
        elif not np.allclose(s.spacing, first.spacing, rtol=1e-4):
            what = f"has PixelSpacing {s.spacing}, not {first.spacing}"
        elif turned > SAME_DIRECTION:
            what = "has another orientation"
        else:
            continue
        raise SceneError(f"{s.path}: {what} as in {Path(first.path).name} of the same series")


def _require_even(folder: Path, slices: Sequence[DicomSlice], along: np.ndarray) -> None:
    """Refuse slices on one place, gaps and uneven steps; ``along``: mm on the normal, (slices,)."""
    steps = np.diff(along)
    apart = steps[steps > 1e-3]
    spacing = float(np.median(apart)) if apart.size else 0.0
    tolerance = _tolerance(spacing)
    for k, step in enumerate(steps.tolist()):
        if abs(step - spacing) <= tolerance and spacing > 0:
            continue
        pair = f"{Path(slices[k].path).name} and {Path(slices[k + 1].path).name}"
        if step <= tolerance:
            raise SceneError(
                f"{folder}: two slices at {along[k]:.2f} mm ({pair}): duplicates, or several "
                "echoes or phases; put each into a folder of its own"
            )
        missing = round(step / spacing) - 1
        whole = abs(step - (missing + 1) * spacing) <= (missing + 1) * tolerance
        if missing >= 1 and whole:
            some = "slice is" if missing == 1 else "slices are"
            raise SceneError(
                f"{folder}: {missing} {some} missing between {pair} "
                f"({step:.2f} mm apart where others are {spacing:.2f})"
            )
        raise SceneError(f"{folder}: uneven slices: {pair} are {step:.3f} mm apart, others {spacing:.3f}")


def _tolerance(spacing: float) -> float:
    return max(0.01 * spacing, 0.01)


def _normal(s: DicomSlice) -> np.ndarray:
    return np.cross(s.orientation[:3], s.orientation[3:])


def _listed(counts: Counter[str]) -> str:
    if not counts:
        return ""
    return " (" + ", ".join(f"{n} {why}" for why, n in sorted(counts.items())) + ")"

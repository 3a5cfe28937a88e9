"""Label and score maps as NIfTI, streamed slab by slab through gzip.

NIfTI stores i fastest and k slowest, and our arrays are (z, y, x) = (k, j, i) in C order: the same
bytes in the same order. So a slab along z is appended as it is, and memory is flat in depth.

The header is built afresh. From the source's header only the numbers that say where the volume is
are taken (sform, qform, their codes, pixdim, units): its text fields may name a patient.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.staging import (
    commit,
    commit_text,
    fit_labels,
    json_text,
    label_dtype,
    slab_boxes,
    slicer_colors,
    staging,
)
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.sources.base import LabelReader, ScoreReader

DATA_OFFSET = {348: 352, 540: 544}
"""Header size to start of the data: the header and four bytes that say "no extensions"."""
_PLACE = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
          "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")  # fmt: skip
_SCANNER = 1
"""NIfTI's code of a transform into the scanner's space."""
_SLACK = 1e-3
"""Millimetres that a corner may move when a DICOM affine is rounded to the header's float32."""


def write_nifti(
    labels: LabelReader,
    geometry: VolumeGeometry,
    source_header: str | Path | None,
    classes: Sequence[Class],
    nodata: int | None,
    path: Path,
) -> None:
    """Write a label map as ``.nii.gz`` (or ``.nii``) on the native grid, atomically, reproducibly.

    Beside it lies ``<name>.ctbl``, a colour table for 3D Slicer with the classes' names.

    Args:
        labels: windowed reader; called with whole slabs along z, in order.
        geometry: of the scene; its affine is what the file must say.
        source_header: the scene's own NIfTI file, whose transforms and codes are repeated; None
            for other formats (the affine becomes the sform with code 1, and the qform too where
            it has no shear).
        classes: values, names and colours.
        nodata: the value of voxels without data, or None. NIfTI has no field for it.
        path: local file ending in ``.nii`` or ``.nii.gz``.

    Raises:
        SceneError: the affine cannot be represented, or a label does not fit the classes.
    """
    dtype = label_dtype(classes, nodata)
    header = _header(geometry, source_header, dtype, path)
    header.set_intent("label")
    header["cal_max"] = max(c.value for c in classes)
    boxes = slab_boxes(geometry.shape, dtype.itemsize)
    slabs = (fit_labels(labels(box), dtype, box, path) for box in boxes)
    _write(path, header, slabs, {".ctbl": slicer_colors(classes)})


def write_nifti_ids(
    ids: LabelReader,
    geometry: VolumeGeometry,
    source_header: str | Path | None,
    dtype: np.dtype[Any],
    path: Path,
) -> None:
    """Write the ids of objects as ``.nii.gz`` (or ``.nii``) on the native grid; 0 is no object.

    Args:
        ids: windowed reader, called as in `write_nifti`.
        geometry: of the scene.
        source_header: as for `write_nifti`.
        dtype: uint32 or uint64.
        path: local file ending in ``.nii`` or ``.nii.gz``.

    Raises:
        SceneError: the affine cannot be represented, or an id does not fit the dtype.
    """
    header = _header(geometry, source_header, dtype, path)
    header.set_intent("label")
    boxes = slab_boxes(geometry.shape, dtype.itemsize)
    _write(path, header, (fit_labels(ids(box), dtype, box, path) for box in boxes), {})


def write_nifti_scores(
    scores: ScoreReader,
    geometry: VolumeGeometry,
    source_header: str | Path | None,
    classes: Sequence[Class],
    path: Path,
) -> None:
    """Write probabilities as a 4D float32 NIfTI: one frame per class, in the classes' order.

    The frames' names are in ``<name>.json``. Frames are slowest in the file, so each slab is read
    once per class.

    Args:
        scores: windowed reader of (class, z, y, x).
        geometry: of the scene.
        source_header: as for `write_nifti`.
        classes: in the order of the score channels.
        path: local file ending in ``.nii`` or ``.nii.gz``.
    """
    dtype = np.dtype(np.float32)
    header = _header(geometry, source_header, dtype, path, frames=len(classes))
    header["cal_max"] = 1

    def slabs() -> Iterator[np.ndarray]:
        for index in range(len(classes)):
            for box in slab_boxes(geometry.shape, dtype.itemsize * len(classes)):
                yield np.ascontiguousarray(scores(box)[index], dtype=dtype)

    _write(path, header, slabs(), {".json": json_text({"frames": [c.name for c in classes]})})


def _write(path: Path, header: Any, slabs: Iterator[np.ndarray], beside: Mapping[str, str]) -> None:
    """Write a file of slabs, and before it is visible the texts beside it, by their suffixes."""
    compress = path.suffix == ".gz"
    with staging(path) as folder:
        draft = folder / "draft"
        with draft.open("wb") as raw:
            # no name and no time in the gzip header: the same labels give the same bytes
            stream: BinaryIO | gzip.GzipFile = (
                gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) if compress else raw
            )
            stream.write(header.binaryblock + bytes(4))
            for slab in slabs:
                ordered = slab.astype(slab.dtype.newbyteorder("<"), copy=False)
                stream.write(np.ascontiguousarray(ordered).data)
            if compress:
                stream.close()
        for suffix, text in beside.items():
            commit_text(folder, path.with_name(path.name.split(".nii")[0] + suffix), text)
        commit(draft, path)


def _header(
    geometry: VolumeGeometry,
    source_header: str | Path | None,
    dtype: np.dtype[Any],
    path: Path,
    frames: int | None = None,
) -> Any:
    """A fresh little-endian header that says exactly where the volume is."""
    source = None if source_header is None else _load_header(source_header)
    shape = (*geometry.shape[::-1], *(() if frames is None else (frames,)))
    large = max(shape) > np.iinfo(np.int16).max
    kind: Any = nib.Nifti2Header if large or isinstance(source, nib.Nifti2Header) else nib.Nifti1Header
    header = kind(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    if source is None:
        _place(header, geometry)
    else:
        for field in _PLACE:
            header[field] = source[field]
        header["pixdim"][:4] = source["pixdim"][:4]
        header.set_xyzt_units(xyz=_spatial_unit(source))
    header.set_slope_inter(1, 0)
    header["magic"] = b"n+1" if kind is nib.Nifti1Header else b"n+2"
    header["vox_offset"] = DATA_OFFSET[int(header["sizeof_hdr"])]
    _check(header, geometry, exact=source is not None, path=path)
    return header


def _load_header(source_header: str | Path) -> Any:
    try:
        header = nib.load(source_header).header
    except (OSError, ImageFileError, HeaderDataError) as error:
        raise SceneError(f"{source_header}: not a readable NIfTI header ({error})") from error
    if not isinstance(header, nib.Nifti1Header):
        raise SceneError(f"{source_header}: a {type(header).__name__}, not a NIfTI header")
    return header


def _spatial_unit(source: Any) -> str:
    try:
        return str(source.get_xyzt_units()[0])
    except KeyError:
        return "unknown"  # a code outside the standard, as some scanners write


def _place(header: Any, geometry: VolumeGeometry) -> None:
    """Sform from the affine, and qform too where it can hold it: some programs read only that."""
    header.set_sform(geometry.matrix, code=_SCANNER)
    header["pixdim"][1:4] = geometry.spacing[::-1]
    try:
        header.set_qform(geometry.matrix, code=_SCANNER, strip_shears=False)
    except HeaderDataError:
        header["qform_code"] = 0
    header.set_xyzt_units(xyz="mm")


def _check(header: Any, geometry: VolumeGeometry, exact: bool, path: Path) -> None:
    """Refuse a header that says another place than the scene's.

    Raises:
        SceneError: with both affines.
    """
    found = header.get_best_affine()
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    corners[:, :3] *= geometry.shape[::-1]
    moved = float(np.abs((found - geometry.matrix) @ corners.T).max())
    if (exact and not np.array_equal(found, geometry.matrix)) or not moved <= _SLACK:
        raise SceneError(
            f"{path}: the scene's affine {geometry.matrix.tolist()} cannot be kept in this NIfTI "
            f"header, which says {found.tolist()} (corners off by {moved:.3g} mm)"
        )

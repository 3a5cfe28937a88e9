"""What exports share: the smallest dtype, atomic files, and class names and colours beside a label map.

A TIFF holds a palette but no names. GDAL reads them from ``<file>.aux.xml`` (category names, and a
raster attribute table, which QGIS and ArcGIS show); QGIS takes ``<name>.qml`` as the layer's style,
so that its legend lists the classes and not 256 colours; 3D Slicer reads ``.ctbl`` colour tables.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from PIL.ImageColor import getrgb
from pyproj import CRS

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.store.location import DRAFT, told_when_full

SLAB_BYTES = 16 * 2**20
"""Bytes read at once; at least one slice."""


def label_dtype(classes: Sequence[Class], nodata: int | None) -> np.dtype[Any]:
    """The smallest of uint8 and uint16 that holds every class value and the nodata value."""
    largest = max([c.value for c in classes] + ([] if nodata is None else [nodata]))
    return np.dtype(np.uint8 if largest <= 255 else np.uint16)


def fit_labels(values: np.ndarray, dtype: np.dtype[Any], box: Box, path: Path) -> np.ndarray:
    """The window in the file's dtype; a value that does not fit is refused, never wrapped around.

    Raises:
        SceneError: a label lies outside the dtype's range, or the window has another shape.
    """
    if values.shape != box.shape:
        raise SceneError(f"{path}: labels at {box} have shape {values.shape}, not {box.shape}")
    limit = np.iinfo(dtype).max
    if values.dtype != dtype and values.size and (values.min() < 0 or values.max() > limit):
        raise SceneError(
            f"{path}: a label at {box} lies in {values.min()}…{values.max()}, outside 0…{limit}: "
            "the model's card must list every class value"
        )
    return np.ascontiguousarray(values, dtype=dtype)


def slab_boxes(shape: Sequence[int], itemsize: int) -> Iterator[Box]:
    """Boxes of whole slices (y, x) of a volume (z, y, x), in order, each of about `SLAB_BYTES`."""
    depth, rows, columns = shape
    step = max(1, SLAB_BYTES // max(1, rows * columns * itemsize))
    for start in range(0, depth, step):
        yield Box((start, 0, 0), (min(start + step, depth), rows, columns))


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A private folder beside ``path``: what is finished there gets its name by `commit`, the rest goes.

    Beside it is the same file system, so a file is there whole or not at all: a crash leaves a hidden
    folder, never half a file under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = tempfile.TemporaryDirectory(prefix=f".{path.name}{DRAFT}", dir=path.parent)
    with draft as folder, told_when_full(path.parent, Path(folder)):  # before the draft goes
        yield Path(folder)


def commit(source: Path, target: Path) -> None:
    """Make a finished file or folder visible under its name, in the place of one that is there.

    Of a folder that is there each file is replaced: no moment is without any of them.
    """
    if not target.is_dir():
        try:
            source.replace(target)
            return
        except OSError:
            if not target.is_dir():
                raise  # else the same request, run twice at once, was faster there
    made = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in sorted(made):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(target / path)
    for path in target.rglob("*"):
        if path.is_file() and path.relative_to(target) not in made:
            path.unlink(missing_ok=True)


def commit_text(folder: Path, target: Path, text: str) -> None:
    """Write a small file into a `staging` folder and make it visible under its name."""
    part = folder / target.name
    part.write_text(text, encoding="utf-8", newline="\n")
    commit(part, target)


def json_text(value: dict[str, Any]) -> str:
    """A JSON file that people may read too."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


LARGEST_LISTED = 255
"""Category names are a dense list from 0: beyond this value only the attribute table is written."""

_INTEGER, _STRING = 0, 2  # GDALRATFieldType
_COLUMNS = (  # name, GDALRATFieldType, GDALRATFieldUsage
    ("Value", _INTEGER, 5),
    ("Class", _STRING, 2),
    ("Red", _INTEGER, 6),
    ("Green", _INTEGER, 7),
    ("Blue", _INTEGER, 8),
)


def gdal_pam(classes: Sequence[Class], crs: CRS | None) -> str:
    """The text of ``<file>.aux.xml``: category names and attribute table of band 1.

    Args:
        classes: what the values mean; none: nothing is said of band 1.
        crs: written only where GeoTIFF keys cannot hold it exactly; GDAL prefers it then.
    """
    root = ET.Element("PAMDataset")
    if crs is not None:
        north_first = crs.axis_info and crs.axis_info[0].direction == "north"
        mapping = "2,1" if north_first else "1,2"  # x and y of the raster to the CRS's axes
        ET.SubElement(root, "SRS", dataAxisToSRSAxisMapping=mapping).text = crs.to_wkt()
    if not classes:
        return _pretty(root)
    band = ET.SubElement(root, "PAMRasterBand", band="1")
    names = {c.value: c.name for c in classes}
    if max(names) <= LARGEST_LISTED:
        categories = ET.SubElement(band, "CategoryNames")
        for value in range(max(names) + 1):
            ET.SubElement(categories, "Category").text = names.get(value, "")
    table = ET.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(_COLUMNS):
        field = ET.SubElement(table, "FieldDefn", index=str(index))
        for tag, content in (("Name", name), ("Type", kind), ("Usage", usage)):
            ET.SubElement(field, tag).text = str(content)
    for index, item in enumerate(sorted(classes, key=lambda c: c.value)):
        row = ET.SubElement(table, "Row", index=str(index))
        for cell in (item.value, item.name, *getrgb(item.color)):
            ET.SubElement(row, "F").text = str(cell)
    return _pretty(root)


def qgis_style(classes: Sequence[Class]) -> str:
    """The text of ``<file>.qml``: one legend entry per class, in the order of the values."""
    root = ET.Element("qgis", version="3.0.0", styleCategories="Symbology")
    pipe = ET.SubElement(root, "pipe")
    renderer = ET.SubElement(pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1")
    palette = ET.SubElement(renderer, "colorPalette")
    for item in sorted(classes, key=lambda c: c.value):
        ET.SubElement(
            palette,
            "paletteEntry",
            value=str(item.value),
            color=item.color,
            alpha="0" if item.background else "255",  # background is looked through
            label=item.name,
        )
    return "<!DOCTYPE qgis>\n" + _pretty(root)


def slicer_colors(classes: Sequence[Class]) -> str:
    """The text of a 3D Slicer colour table: value, name without blanks, red, green, blue, alpha."""
    lines = ["# Color table file", f"# {len(classes)} values"]
    for item in sorted(classes, key=lambda c: c.value):
        red, green, blue = getrgb(item.color)[:3]
        name = "_".join(item.name.split()) or "unnamed"
        alpha = 0 if item.background else 255
        lines.append(f"{item.value} {name} {red} {green} {blue} {alpha}")
    return "\n".join(lines) + "\n"


def _pretty(root: ET.Element) -> str:
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"

"""VRT files that an operator lists as scenes: checked, and rewritten before GDAL sees them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from segpipe.errors import SceneError
from segpipe.sources.common import reason

SUFFIX = ".vrt"

ELEMENTS = frozenset(
    (
        "VRTDataset", "SRS", "GeoTransform", "GCPList", "GCP", "Metadata", "MDI", "MaskBand",
        "VRTRasterBand", "Description", "NoDataValue", "HideNoDataValue", "ColorInterp", "ColorTable",
        "Entry", "CategoryNames", "Category", "UnitType", "Offset", "Scale", "OverviewList", "SimpleSource",
        "ComplexSource",
        "SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA", "UseMaskBand",
        "ScaleOffset", "ScaleRatio", "ColorTableComponent", "LUT",
    )
)  # fmt: skip
"""Elements that only lay pixels of files on a grid; none of them names a driver, an option or a function."""


def read_vrt(path: Path) -> tuple[str, list[str]]:
    """Return a VRT's text with absolute paths, and the paths of its sources.

    GDAL gets this text and not the file, so it sees what was checked here, however it parses XML.

    Raises:
        SceneError: the file is no VRT; has an element or a kind of band beyond copies of files' pixels;
            or has a source that is no file of its own on a local disk.
    """
    try:
        root = ET.fromstring(path.read_bytes())
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise SceneError(f"{path}: cannot be opened: it is no VRT ({reason(error)})") from error
    sources = []
    for element in root.iter():
        _check_element(path, element)
        if element.tag == "SourceFilename":
            source = _source(path, element.text or "")
            element.text, element.attrib = source, {"relativeToVRT": "0"}
            sources.append(source)
    if root.tag != "VRTDataset":
        raise SceneError(f"{path}: cannot be opened: it holds <{root.tag}>, not <VRTDataset>")
    return ET.tostring(root, encoding="unicode"), list(dict.fromkeys(sources))


def _check_element(path: Path, element: ET.Element) -> None:
    """Reject what is more than a copy of pixels.

    Raises:
        SceneError: it is.
    """
    found = ""
    if element.tag not in ELEMENTS:
        found = f"<{element.tag}>"
    elif "subClass" in element.attrib:
        found = f'<{element.tag} subClass="{element.attrib["subClass"]}">'
    elif element.attrib.get("key", "").upper() == "OVERVIEW_FILE":
        found = "overviews in another file"
    if found:
        raise SceneError(
            f"{path}: the VRT has {found}; only copies of the pixels of files are read from a VRT: "
            f"write it as a GeoTIFF first, with gdal_translate"
        )


def _source(path: Path, name: str) -> str:
    """The absolute path of a source.

    Raises:
        SceneError: it is no file on a local disk.
    """
    source = str((path.absolute().parent / name).resolve())
    # GDAL takes a name with "<" for the text of a dataset, and one that begins with /vsi for a file system.
    if not name or "<" in name or source.startswith("/vsi") or not Path(source).is_file():
        raise SceneError(f"{path}: the VRT has the source {name!r}, which is no file on a local disk")
    return source

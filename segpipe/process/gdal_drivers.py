"""The GDAL drivers that may open a file, and the environment that removes all others.

GDAL chooses a driver by a file's content, not by its name. Some drivers take a text as a program: they append
to files (MRF), read other files (VRT), or make HTTP requests (WMS, WMTS, WCS, STACIT, WFS). A scene is data,
so there are two walls. `segpipe.sources.gdal` and `segpipe.sources.vectors` name the drivers that may
open a file; and `skip_other_drivers` removes the rest from GDAL, because GDAL opens the sources of a VRT,
overviews and masks with every driver that it has.

This module imports no GDAL: it runs before the first import of rasterio and pyogrio.
"""

from __future__ import annotations

import os

RASTER_DRIVERS = (
    "GTiff", "COG", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "netCDF", "HDF5", "HDF5Image", "GRIB",
    "NITF", "HFA", "ENVI", "EHdr", "KEA", "PNG", "JPEG", "JPEGXL", "WEBP", "GIF", "BIGGIF", "BMP", "PNM",
    "AAIGrid", "SRTMHGT", "DTED", "USGSDEM",
)  # fmt: skip
"""Drivers that decode the pixels of the file itself. Names that a build of GDAL lacks are ignored by it."""

VECTOR_DRIVERS = (
    "GeoJSON", "GeoJSONSeq", "GPKG", "FlatGeobuf", "ESRI Shapefile", "OpenFileGDB", "KML", "LIBKML", "GPX",
    "MapInfo File", "CSV", "Parquet", "Arrow",
)  # fmt: skip
"""Drivers that decode the features of the file itself. GML downloads the schema that a file names."""

OWN_DRIVERS = ("VRT", "MEM", "Memory")
"""Drivers that stay registered for datasets of our own; none of them opens a file that we are given."""

SKIPPED_DRIVERS = (
    "ACE2", "ADRG", "AIG", "AVCBin", "AVCE00", "AirSAR", "BSB", "BT", "BYN", "CALS", "CEOS", "COASP",
    "COSAR", "CPG", "CTG", "DAAS", "DERIVED", "DIMAP", "DOQ1", "DOQ2", "ECRGTOC", "EEDA", "EEDAI",
    "EIR", "ERS", "ESAT", "ESRIC", "ESRIJSON", "FAST", "GFF", "GNMDatabase", "GNMFile",
    "GRASSASCIIGrid", "GS7BG", "GSAG", "GSBG", "GSC", "GTI", "GTX", "GXF", "GenBin", "HF2", "HTTP",
    "ILWIS", "IRIS", "ISCE", "ISG", "ISIS2", "ISIS3", "JAXAPALSAR", "JDEM", "KMLSUPEROVERLAY", "KRO",
    "L1B", "LAN", "LCP", "LOSLAS", "Leveller", "MAP", "MBTiles", "MFF", "MFF2", "MRF", "MSGN", "MVT",
    "NDF", "NGSGEOID", "NOAA_B", "NSIDCbin", "NTv2", "NWT_GRC", "NWT_GRD", "OSM", "PAux", "PCIDSK",
    "PCRaster", "PDF", "PDS", "PDS4", "PLMOSAIC", "PRF", "RIK", "RMF", "ROI_PAC", "RPFTOC", "RRASTER",
    "RS2", "RST", "SAFE", "SAGA", "SAR_CEOS", "SENTINEL2", "SIGDEM", "SNAP_TIFF", "SNODAS", "SQLite",
    "SRP", "STACIT", "STACTA", "TGA", "TIL", "TSX", "Terragen", "TopoJSON", "VICAR", "WCS", "WMS",
    "WMTS", "XYZ", "ZMap", "Zarr",
)  # fmt: skip
"""Drivers that both rasterio's and pyogrio's GDAL have and that are not allowed.

pyogrio's GDAL prints a warning for each name that it does not know, so names that only one of them has are
not here.
"""

RASTERIO_DRIVERS = (
    "BAG", "BLX", "CTable2", "DIPEx", "ELAS", "FIT", "OZI", "R", "Rasterlite", "S102", "S104", "S111", "SDTS",
    "SGI", "XPM",
)  # fmt: skip
"""Drivers that only rasterio's GDAL has and that are not allowed."""


def skip_other_drivers() -> None:
    """Set the environment so that GDAL registers no driver of `SKIPPED_DRIVERS`, in this and child processes.

    Names that the user skips stay skipped. VRT bands of Python code and of raw files are switched off.
    """
    os.environ["GDAL_SKIP"] = skip_list(SKIPPED_DRIVERS)
    os.environ["GDAL_VRT_ENABLE_PYTHON"] = "NO"
    os.environ["GDAL_VRT_ENABLE_RAWRASTERBAND"] = "NO"  # GDAL 3.12 and later know it


def skip_list(names: tuple[str, ...], variable: str = "GDAL_SKIP") -> str:
    """Return the value of a skip list that has the names of the environment's and these, each once."""
    found = os.environ.get(variable, "")
    # GDAL separates by spaces unless there is a comma: "ESRI Shapefile" has a space in it.
    given = [name.strip() for name in (found.split(",") if "," in found else found.split())]
    return ",".join(dict.fromkeys([*filter(None, given), *names]))

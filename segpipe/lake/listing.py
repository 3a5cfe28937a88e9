"""What is in a lake: scenes as a stream, whatever kind of lake it is."""

from __future__ import annotations

from collections.abc import Iterator

from segpipe.config.scan import Lake, LakeKind
from segpipe.lake.entry import LakeEntry
from segpipe.process.extras import check_installed


def list_lake(lake: Lake) -> Iterator[LakeEntry]:
    """Every scene of a lake, in the same order each time; an empty lake yields nothing.

    Memory does not follow the number of scenes: nothing is kept of those that were yielded.

    Raises:
        RequestError: while iterating: the location is not there or cannot be listed, or what is asked for is
            not in it; names the field.
    """
    # Imported here: each kind has libraries of its own.
    if lake.kind is LakeKind.stac:
        check_installed("pystac_client", "a lake of STAC items")
        from segpipe.lake.stac import list_stac

        return list_stac(lake)
    if lake.kind is LakeKind.bids:
        from segpipe.lake.bids import list_bids

        return list_bids(lake)
    if lake.kind is LakeKind.dicom:
        check_installed("pydicom", "a lake of DICOM files")
        from segpipe.lake.dicom import list_dicom

        return list_dicom(lake)
    from segpipe.lake.files import list_files

    return list_files(lake)

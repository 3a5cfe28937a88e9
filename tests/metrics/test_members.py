"""Which objects lie where: sums and homes as pandas groups them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.geometry.box import Box, grid_boxes
from segpipe.objects.table import Members, add, members_tile
from segpipe.regions.base import FULL, Cover, RegionSet


class Shares(RegionSet):
    """The whole scene, then regions whose cover is drawn on the scene's grid."""

    def __init__(self, shares: np.ndarray) -> None:
        """``shares``: (region, …) in 1/65536."""
        self.shares = shares
        self.names = ("scene", *(f"r{i}" for i in range(len(shares))))

    def cover(self, tile: Box) -> Iterator[Cover]:
        yield Cover(0, tile, None)
        for number, share in enumerate(self.shares, start=1):
            rows = np.flatnonzero(share[tile.slices].reshape(tile.shape[0], -1).any(1))
            if len(rows):  # no more than the rows that it touches, as polygons answer
                first, last = tile.start[0] + int(rows[0]), tile.start[0] + int(rows[-1]) + 1
                part = Box((first, *tile.start[1:]), (last, *tile.stop[1:]))
                yield Cover(number, part, share[part.slices].astype(np.uint32))

    def outside(self, region: int) -> int:
        return 0

    def identity(self) -> dict[str, object]:
        return {}


@settings(max_examples=25)
@given(st.integers(0, 9999), st.sampled_from([(23, 31), (7, 9, 11)]), st.integers(1, 12), st.booleans())
def test_sums_are_those_of_pandas_and_tiles_change_nothing(
    seed: int, shape: tuple[int, ...], step: int, huge: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, shape).astype(np.uint64) * np.uint64(2**33 if huge else 1)
    shares = rng.integers(0, FULL + 1, (3, *shape)) * (rng.random((3, *shape)) < 0.4)
    frame = pd.concat(
        pd.DataFrame({"region": number, "object": ids.ravel().astype(np.int64), "cover": share.ravel()})
        for number, share in enumerate([np.full(shape, FULL), *shares])
    )
    frame = frame[(frame["object"] > 0) & (frame["cover"] > 0)]
    want = frame.groupby(["region", "object"])["cover"].sum()
    tiles = [members_tile(ids[b.slices], Shares(shares), b) for b in grid_boxes(shape, [step] * len(shape))]
    members = add(reversed([Members.from_columns(**json.loads(json.dumps(t.to_json()))) for t in tiles]))
    found = pd.DataFrame(vars(members)).set_index(["region", "object"])["cover"]
    pd.testing.assert_series_equal(found, want, check_dtype=False)
    assert all(column.dtype == np.int64 for column in vars(members).values())
    if not huge:
        regions = want.drop(0, level="region", errors="ignore").rename("cover").reset_index()
        best = regions.sort_values(["cover", "region"], ascending=[False, True]).drop_duplicates("object")
        homes = dict(zip(best["object"], best["region"], strict=True))
        assert members.homes(5).tolist() == [homes.get(number, -1) for number in range(1, 6)]


def test_homes() -> None:
    """Most, whatever the order; of equal parts the first region; never the scene; −1 for none."""
    rows = [(0, 1, 90), (2, 1, 50), (1, 1, 40), (0, 2, 10), (3, 2, 5), (2, 2, 5), (0, 3, 7)]
    region, object_, cover = zip(*rows, strict=True)
    members = Members.from_columns(region=region, object=object_, cover=cover)
    assert members.homes(4).tolist() == [2, 2, -1, -1]
    assert Members.from_columns(region=[0], object=[1], cover=[1]).homes(1).tolist() == [-1]
    assert add([]).homes(0).tolist() == []
    assert add([]).homes(2).tolist() == [-1, -1]

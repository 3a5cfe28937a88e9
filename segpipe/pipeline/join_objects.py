"""The objects of a scene: what windows found, joined block by block, written as ids and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from segpipe.geometry.box import Box
from segpipe.inference.object_merger import ground_value, load_parts, stuff_values
from segpipe.metrics.tally import SizeScale
from segpipe.objects.nodes import (
    Nodes,
    Overhang,
    PairCounts,
    add_nodes,
    add_pairs,
    overhang_boxes,
    window_edges,
)
from segpipe.objects.scene_objects import merge_objects, relabel
from segpipe.objects.table import TABLE, ObjectTable, add_sizes
from segpipe.pipeline.model_scene import Scene
from segpipe.store.arrays import ArraySpec
from segpipe.store.receipts import Marks
from segpipe.store.stage import WHOLE
from segpipe.tiling.windows import Lattice, block_id


def join_objects(scene: Scene) -> None:
    """Join what all windows found; write class values, ids and the table into the scene's labels stage.

    Streams over blocks twice: ids of a block and its neighbours' rims, then ids and classes of a block.
    In memory are the nodes and their pairs, which follow the number of objects.
    """
    lattice, blocks, card = scene.plan.lattice, scene.plan.blocks, scene.card

    def raw(box: Box) -> np.ndarray:
        return scene.predict.read("objects", box.slices)

    nodes: list[Nodes] = []
    pairs: list[PairCounts] = []
    for index in blocks.indices():
        found, overhangs = load_parts(scene.predict.read_part(block_id(index)))
        nodes.append(found)
        pairs += _edges(overhangs, lattice, raw)
    merged, lookup = merge_objects(
        add_nodes(nodes, len(blocks.shape)),
        add_pairs(pairs),
        lattice,
        stuff=stuff_values(card),
        minimum=scene.job.measure.smallest,
    )
    arrays = [
        ArraySpec("labels", card.label_dtype, scene.nodata, labels=True),
        ArraySpec("instances", str(lookup.dtype), 0, labels=True),
    ]
    in_force = scene.labels.create(scene.geometry, blocks, arrays, {"scene": scene.ref.name}, whole=True)
    scale = SizeScale.of(scene.geometry)
    size = np.zeros(len(merged), np.int64)
    sums = np.zeros((len(merged), len(blocks.shape)), np.int64)
    files: Marks = {}
    for index in in_force.indices():
        box = in_force.box(index)
        local = raw(box)
        ids = relabel(local, box, lattice, lookup)
        classes = scene.predict.read("labels", box.slices)
        classes[(local > 0) & (ids == 0)] = ground_value(card)  # too small to be an object
        files |= scene.labels.write("labels", box.slices, classes)
        files |= scene.labels.write("instances", box.slices, ids)
        add_sizes(ids, box, scale, size, sums)
    files |= scene.labels.write_part(TABLE, ObjectTable(merged, size, sums).dump())
    scene.labels.commit(WHOLE, {"objects": len(merged)}, files)


def _edges(
    overhangs: list[Overhang], lattice: Lattice, read: Callable[[Box], np.ndarray]
) -> Iterator[PairCounts]:
    """Counts of a block's windows with their neighbours, from one read of what they see."""
    boxes = [box for o in overhangs for _, box in overhang_boxes(lattice, o.index)]
    if not boxes:
        return
    hull = boxes[0]
    for box in boxes[1:]:
        hull = hull.hull(box)
    near = read(hull)
    for overhang in overhangs:
        yield window_edges(overhang, lattice, lambda box: near[box.within(hull)])

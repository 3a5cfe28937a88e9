"""What a question will cost, without asking it."""

from __future__ import annotations

from segpipe.config.job import Job
from segpipe.inference.settings import Settings
from segpipe.pipeline.given_scene import find_labels
from segpipe.prompts.grounding.detect_scene import Detecting
from segpipe.prompts.grounding.merge_boxes import detection_windows
from segpipe.prompts.inputs.files import read_prompts
from segpipe.prompts.inputs.label_prompts import read_labels
from segpipe.prompts.inputs.prompts import Prompts
from segpipe.prompts.masks.embedding_cache import window_id
from segpipe.prompts.prompt_scene import PromptScene, prepare_prompts
from segpipe.sources import SceneRef
from segpipe.tables.units import byte_size


def prompt_line(job: Job, ref: SceneRef, settings: Settings) -> str:
    """What a scene takes, in a line: windows to encode and what is kept of them, a grounder's work.

    Of phrases and of volumes it is the most it can be: where their objects are shows when they are found.
    """
    scene = prepare_prompts(job, ref, settings)
    kept = set(scene.embeddings.stage.done()) if scene.embeddings.stage.exists else set()
    windows, most = _windows(scene)
    new = len(windows - kept) if not most else max(0, len(windows) - len(kept))
    said = "at most " if most else ""
    each = scene.embeddings.window_bytes
    line = (
        f"{said}{new:,} windows of {scene.pyramid.window} to encode ({len(windows & kept):,} are kept), "
        f"embeddings {said}{byte_size(each * len(windows))}"
    )
    grounder = scene.grounder
    if isinstance(grounder, Detecting):
        left = len(grounder.pending()) if grounder.stage.exists else len(grounder.windows())
        return f"{line}; {left:,} windows for {grounder.card.name}"
    if grounder is not None:
        s = grounder.plan.summary()
        return f"{line}; up to {s['forward_passes']:,} passes of {grounder.card.name}"
    return line


def _windows(scene: PromptScene) -> tuple[set[str], bool]:
    """Names of the windows, and whether they are more than will be asked."""
    options, pyramid = scene.options, scene.pyramid
    parts: list[Prompts] = []
    if options.path:
        drawn, _ = read_prompts(
            options.path, scene.geometry, crs=options.crs, layer=options.layer, polygons=options.polygons
        )
        parts.append(drawn)
    if options.earlier:
        path = find_labels(options.earlier, scene.ref.name)
        parts.append(read_labels(path, scene.geometry, ids=options.earlier_ids)[0])
    if scene.planes.axis is not None:
        return {str(i) for i in range(scene.planes.count)}, True
    if options.text:
        return {window_id(w) for w in detection_windows(pyramid, range(pyramid.levels))}, True
    found = [extent for part in parts if len(part) for extent in [part.extents()]]
    names = {window_id(w) for e in found for w in pyramid.needed(e.start, e.stop)[0]}
    if options.everything:
        names |= {window_id(w) for w in detection_windows(pyramid, range(options.grid.levels))}
    return names, False

"""Answer the prompts of one scene in this process: ground phrases, then segment window by window."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.predict import predict_blocks
from segpipe.pipeline.progress import Done, together
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.grounding.detect_scene import detect_windows
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_windows import create_mask_stages, next_round, segment_windows
from segpipe.prompts.volumes.segment_volume import segment_volume
from segpipe.store.stage import StopToken


def answer_scene(
    scene: PromptScene,
    stop: StopToken | None = None,
    progress: Callable[[int, int], None] = lambda n, of: None,
) -> Done:
    """Settle the prompts of a scene and segment them, round by round.

    Args:
        scene: its stages are made.
        stop: looked at before every window.
        progress: told the windows of a round that are done, and how many it has.

    Raises:
        SceneError, StoppedError, DeviceMemoryError.
    """
    grounder = None if scene.collected else scene.grounder
    if isinstance(grounder, Scene):
        predict_blocks(grounder, pending_blocks(grounder), stop)
    elif grounder is not None:
        detect_windows(grounder, grounder.pending(), stop)
    collect_prompts(scene)
    create_mask_stages(scene)
    if scene.planes.axis is not None:
        return segment_volume(scene, stop)
    done: list[Done] = []
    for number in count():
        here = next_round(scene, number)
        if here is None:
            return together(done, 0)
        progress(here.total - len(here.windows), here.total)
        done.append(segment_windows(scene, number, here.windows, stop))
        progress(here.total, here.total)
    raise AssertionError("rounds end")

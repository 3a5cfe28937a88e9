"""A scene ready to be asked: opened, held against the promptable model, its stages keyed.

Four stages of its own, each of which can be killed and goes on: what is asked (``ask``), embeddings
(``embed``), answers by window (``answers``), objects on the native grid (``objects``). Then it is measured as
any scene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from segpipe import ANSWER_VERSION, ENGINE_VERSION
from segpipe.config.card import Card, Class, read_card
from segpipe.config.job import Job
from segpipe.config.prompts import PromptOptions
from segpipe.errors import SceneError
from segpipe.inference.normalise import Normaliser, Statistics, needs_statistics, scene_statistics
from segpipe.inference.settings import Settings, resolve_settings
from segpipe.pipeline.given_scene import find_labels, labels_identity
from segpipe.pipeline.keys import device_parts, model_parts
from segpipe.pipeline.model_scene import Scene, create_stages, prepare_scene
from segpipe.pipeline.scene import PredictedScene, SceneAccount, hardest, open_scene
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.prompts.grounding.detect_scene import Detecting, detecting_of
from segpipe.prompts.masks.embedding_cache import PREFIX, Embeddings
from segpipe.prompts.masks.read_planes import Planes
from segpipe.prompts.phrase_classes import file_mark, phrase_classes
from segpipe.prompts.prompt_set import Asked
from segpipe.prompts.segmenters.registry import check_segmenter
from segpipe.sources import SceneRef
from segpipe.sources.bands import match_bands
from segpipe.store.stage import Stage, stage_key
from segpipe.tiling.pyramid import Pyramid

ACCOUNT = "account.json"
"""Name of what the joining of objects leaves: the account of every phrase and prompt."""
ASKED = "asked"
"""Name of the part of the stage `ask` that holds what is asked."""


@dataclass(frozen=True, kw_only=True)
class PromptScene(PredictedScene):
    """A scene that is asked for objects; its channels are the promptable model's."""

    planes: Planes
    embeddings: Embeddings
    ask: Stage
    answers: Stage
    grounder: Scene | Detecting | None
    """What finds the phrases: a semantic model over the scene, or a detector."""
    labeller: Detecting | None
    """What names masks of a grid."""

    @property
    def options(self) -> PromptOptions:
        """What the job asks."""
        return self.job.prompts

    @property
    def pyramid(self) -> Pyramid:
        """Windows of a plane."""
        return self.embeddings.pyramid

    @cached_property
    def _classes(self) -> tuple[Class, ...]:
        return phrase_classes(self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def classes(self) -> tuple[Class, ...]:
        """The phrases."""
        return self._classes

    @property
    def nodata(self) -> int:
        return 65535

    @property
    def objects_stage(self) -> Stage:
        return self.labels

    @property
    def prompted(self) -> bool:
        return True

    @property
    def settled(self) -> bool:
        """Whether it is known what is asked: phrases need not be looked for again."""
        return self.ask.exists and ASKED in self.ask.done()

    @property
    def asked(self) -> Asked:
        """The prompts that are settled.

        Raises:
            SceneError: another run dropped them.
        """
        return Asked.load(self.ask.read_part(ASKED))

    def account(self) -> SceneAccount:
        """Keys of the embeddings and answers, windows and encoder passes, and what became of each phrase."""
        receipts = self.answers.receipts().values()
        edge = self.pyramid.window
        flat = self.planes.axis is None
        found = self.labels.read_json(ACCOUNT)
        return SceneAccount(
            keys={"embed": self.embeddings.stage.key, "answers": self.answers.key},
            plan={
                "windows": len(receipts) if flat else len(self.embeddings.stage.done()),
                "window": f"{edge}x{edge}",
                "encoder_passes": sum(int(r["encoded"]) for r in receipts),
                "prompts": len(self.asked),
            },
            asked=tuple(found["asked"]),
            prompts=tuple(found["prompts"]),
        )

    def attempts(self) -> int:
        """How often the hardest window was tried."""
        return hardest(self.answers)

    @property
    def normaliser(self) -> Normaliser:
        """The card's steps, bound to this scene."""
        return Normaliser(self.card, self.pixels.scaling, Statistics(self.statistics))


def prompted_card(job: Job) -> Card:
    """The card of a job's promptable model, with the bands that the job shows it."""
    card = read_card(job.model)
    if not job.prompts.bands:
        return card
    shown = card.model_copy(
        update={"input": card.input.model_copy(update={"bands": list(job.prompts.bands)})}
    )
    shown._folder = card.folder
    return shown


def grounding_job(job: Job) -> Job:
    """The job that maps the probabilities of a vocabulary's model over a scene."""
    return Job.model_validate(
        {
            "name": job.name,
            "scenes": list(job.scenes),
            "model": job.prompts.grounder,
            "bands": list(job.bands),
            "tiling": {**job.tiling.model_dump(), "window": "auto", "halo": "auto"},
            "compute": job.compute.model_dump(),
            "outputs": {**job.outputs.model_dump(), "scores": True, "uncertainty": False},
        }
    )


def prepare_prompts(job: Job, ref: SceneRef, settings: Settings) -> PromptScene:
    """Open, check and key a scene that is asked for objects; makes no stage.

    Raises:
        SceneError: the scene does not suit the model or the grounder, or cannot be read.
        RequestError: a prompt or an option suits no scene of this kind.
    """
    options, card = job.prompts, prompted_card(job)
    shapes = check_segmenter(card)
    with open_scene(job, ref) as source:
        pixels, notes = ScenePixels.of(source, job.bands, *match_bands(card, source)), source.notes
    planes = Planes.of(pixels.geometry, options.volume.plane)
    if planes.axis is not None and options.everything:
        raise SceneError("prompts.everything: found true; the scene is a volume, and a grid is for rasters")
    assert card.window_shape is not None
    pyramid = Pyramid(planes.plane_shape, card.window_shape[-1], options.margin)
    source_key = stage_key(
        "ingest", {"source": pixels.identity, "channels": pixels.channels, "engine": ENGINE_VERSION}
    )
    with SceneBlocks(pixels) as image:
        look = Stage(job.outputs.dir, stage_key("look", {"source": source_key, **model_parts(card)}))
        statistics = known_statistics(look, card, image)
    encoded = {
        "source": source_key, **model_parts(card), **device_parts(settings), "batch": settings.batch,
        "axis": planes.axis, "window": pyramid.window,
    }  # fmt: skip
    embed = Stage(job.outputs.dir, stage_key(PREFIX, encoded))
    grounder = _grounder(job, ref) if options.grounder else None
    labeller = None
    if options.labeller:
        mine = resolve_settings(job.compute, read_card(options.labeller))
        labeller = detecting_of(job, options.labeller, ref, mine)
    ask = Stage(job.outputs.dir, stage_key("ask", ask_parts(job, ref, source_key, grounder)))
    asked = {
        "embed": embed.key, "ask": ask.key, "margin": options.margin, "choice": options.choice.value,
        "volume": options.volume.model_dump(mode="json"), "version": ANSWER_VERSION,
    }  # fmt: skip
    answers = Stage(job.outputs.dir, stage_key("answers", asked))
    joined = {
        "of": answers.key, "same": options.same, "smallest": job.measure.smallest,
        "names": labeller.stage.key if labeller else "",
    }  # fmt: skip
    return PromptScene(
        ref=ref, job=job, pixels=pixels, notes=notes, card=card, settings=settings, statistics=statistics,
        planes=planes,
        embeddings=Embeddings(embed, pyramid, planes, shapes), ask=ask, answers=answers,
        labels=Stage(job.outputs.dir, stage_key("objects", joined)), grounder=grounder, labeller=labeller,
    )  # fmt: skip


def create_grounder(scene: PromptScene) -> PromptScene:
    """Make the stages of what finds phrases."""
    if isinstance(scene.grounder, Detecting):
        scene.grounder.create()
    elif isinstance(scene.grounder, Scene):
        return replace(scene, grounder=create_stages(scene.grounder))
    return scene


def known_statistics(
    look: Stage, card: Card, image: SceneBlocks
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """The scene's statistics for the card's steps: found once, then read from the store."""
    if not needs_statistics(card):
        return ()
    known = look.read_json("look.json")
    if known is None:
        known = scene_statistics(card, image.pixels.geometry, image.pixels.scaling, image).to_json()
        look.write_json("look.json", known)
    return Statistics.from_json(known).pairs


def _grounder(job: Job, ref: SceneRef) -> Scene | Detecting:
    card = read_card(job.prompts.grounder)
    mine = resolve_settings(job.compute, card)
    if card.output.kind == "boxes":
        return detecting_of(job, job.prompts.grounder, ref, mine)
    return prepare_scene(grounding_job(job), card, ref, mine)


def ask_parts(job: Job, ref: SceneRef, source_key: str, grounder: Scene | Detecting | None) -> dict[str, Any]:
    """Everything that what is asked depends on."""
    options = job.prompts
    fields = ("text", "threshold", "crs", "layer", "polygons", "earlier_ids", "names", "everything", "grid")
    earlier = find_labels(options.earlier, ref.name) if options.earlier else ""
    return {
        "options": options.model_dump(mode="json", include={*fields}),
        "source": source_key,
        "smallest": job.measure.smallest,
        "file": file_mark(options.path) if options.path else "",
        "earlier": labels_identity(earlier) if earlier else {},
        "grounder": _grounder_key(grounder),
        "version": ANSWER_VERSION,
    }


def _grounder_key(grounder: Scene | Detecting | None) -> str:
    """What finds the phrases, its class names and synonyms included."""
    if grounder is None:
        return ""
    if isinstance(grounder, Detecting):
        return grounder.stage.key
    words = [c.model_dump(mode="json", exclude={"color"}) for c in grounder.card.classes]
    return stage_key("words", {"of": grounder.predict.key, "classes": words})

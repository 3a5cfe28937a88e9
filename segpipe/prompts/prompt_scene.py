"""Check a request for a promptable model, and prepare its scenes: open them, key their stages.

A scene has four stages of its own, each of which can be killed and goes on: prompts (``ask``), embeddings
(``embed``), masks by window (``answers``), objects on the native grid (``objects``). Then it is measured as
any scene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from segpipe import ANSWER_VERSION, ENGINE_VERSION
from segpipe.config.card import Card, Class, read_card
from segpipe.config.job import TTA, Blend, Job
from segpipe.config.prompts import PromptOptions
from segpipe.errors import RequestError, SceneError
from segpipe.inference.normalise import Normaliser, Statistics, needs_statistics, scene_statistics
from segpipe.inference.settings import Settings, resolve_settings
from segpipe.models.registry import ModelDescription, check_card, describe
from segpipe.models.weights import resolve_weights
from segpipe.pipeline.given_scene import find_labels, labels_identity
from segpipe.pipeline.model_scene import Scene, create_stages, prepare_scene
from segpipe.pipeline.plan_scene import device_parts, model_parts
from segpipe.pipeline.scene import PredictedScene, SceneAccount, hardest, open_scene
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.prompts.grounding.detect_scene import DetectorScene, prepare_detector
from segpipe.prompts.masks.embeddings import PREFIX, Embeddings, Planes
from segpipe.prompts.phrases import file_fingerprint, parse_phrases, phrase_classes
from segpipe.prompts.prompt_set import PromptSet
from segpipe.prompts.segmenters.registry import check_segmenter, load_segmenter
from segpipe.sources import SceneRef
from segpipe.sources.base import match_bands
from segpipe.store.stage import WHOLE, Stage, stage_key
from segpipe.tiling.pyramid import Pyramid

ACCOUNT = "account"
"""Name of the file beside the objects: what became of every phrase and prompt."""
ASKED = "asked"
"""Name of the part of the stage of prompts that holds them."""


@dataclass(frozen=True, kw_only=True)
class PromptScene(PredictedScene):
    """A scene of a prompted run; its channels are the promptable model's."""

    planes: Planes
    embeddings: Embeddings
    prompts: Stage
    masks: Stage
    grounder: Scene | DetectorScene | None
    """What finds the phrases: a semantic model over the scene, or a detector."""
    labeller: DetectorScene | None
    """What names masks of a grid."""

    @property
    def options(self) -> PromptOptions:
        """The job's prompts and how they are used."""
        return self.job.prompts

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.embeddings.stage, self.prompts, self.masks, self.labels

    @property
    def pyramid(self) -> Pyramid:
        """Windows of a plane."""
        return self.embeddings.pyramid

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def classes(self) -> tuple[Class, ...]:
        """The phrases."""
        return phrase_classes(self.options)

    @property
    def nodata(self) -> int:
        return 65535

    @property
    def objects_stage(self) -> Stage:
        return self.labels

    @property
    def collected(self) -> bool:
        """Whether the prompts are in the store: phrases need not be looked for again."""
        return self.prompts.exists and ASKED in self.prompts.done()

    @property
    def prompt_set(self) -> PromptSet:
        """The prompts that were collected.

        Raises:
            SceneError: another run dropped them.
        """
        return PromptSet.load(self.prompts.read_part(ASKED))

    def account(self) -> SceneAccount:
        """Keys of the embeddings and masks, windows and encoder passes, and what became of each phrase."""
        receipts = self.masks.receipts().values()
        edge = self.pyramid.window
        flat = self.planes.axis is None
        whole = self.labels.receipt(WHOLE)
        if whole is None:
            raise SceneError(f"the stored stage {self.labels.key} is gone or damaged; run the job again")
        found = whole[ACCOUNT]
        plan = {
            "windows": len(receipts) if flat else len(self.embeddings.stage.done()),
            "window": f"{edge}x{edge}", "encoder_passes": sum(int(r["encoded"]) for r in receipts),
            "prompts": len(self.prompt_set),
        }  # fmt: skip
        keys = {"embed": self.embeddings.stage.key, "answers": self.masks.key}
        return SceneAccount(
            keys=keys, plan=plan, asked=tuple(found["asked"]), prompts=tuple(found["prompts"])
        )

    def attempts(self) -> int:
        """How often the hardest window was tried."""
        return hardest(self.masks)

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
    """Open, check and key a scene of a prompted run; make no stage.

    Raises:
        SceneError: the scene does not suit the model or the grounder, or cannot be read.
        RequestError: a prompt or an option suits no scene of this kind.
    """
    options, card = job.prompts, prompted_card(job)
    shapes = check_segmenter(card)
    with open_scene(job, ref) as source:
        pixels, notes = (
            ScenePixels.of(source, job.bands, *match_bands(card, source), job.identity),
            source.notes,
        )
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
        labeller = prepare_detector(job, options.labeller, ref, mine)
    prompts = Stage(job.outputs.dir, stage_key("ask", prompt_parts(job, ref, source_key, grounder)))
    decoded = {
        "embed": embed.key, "ask": prompts.key, "margin": options.margin, "choice": options.choice.value,
        "volume": options.volume.model_dump(mode="json"), "version": ANSWER_VERSION,
    }  # fmt: skip
    masks = Stage(job.outputs.dir, stage_key("answers", decoded))
    merged = {
        "of": masks.key, "same": options.same, "smallest": job.measure.smallest,
        "names": labeller.stage.key if labeller else "",
    }  # fmt: skip
    return PromptScene(
        ref=ref, job=job, pixels=pixels, notes=notes, card=card, settings=settings, statistics=statistics,
        planes=planes,
        embeddings=Embeddings(embed, pyramid, planes, shapes), prompts=prompts, masks=masks,
        labels=Stage(job.outputs.dir, stage_key("objects", merged)), grounder=grounder, labeller=labeller,
    )  # fmt: skip


def create_grounder(scene: PromptScene) -> PromptScene:
    """Make the stages of what finds phrases; what is damaged of prompts and boxes is found again."""
    scene.prompts.scrub()
    if isinstance(scene.grounder, DetectorScene):
        scene.grounder.create()
        scene.grounder.stage.scrub()
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


def _grounder(job: Job, ref: SceneRef) -> Scene | DetectorScene:
    card = read_card(job.prompts.grounder)
    mine = resolve_settings(job.compute, card)
    if card.output.kind == "boxes":
        return prepare_detector(job, job.prompts.grounder, ref, mine)
    return prepare_scene(grounding_job(job), card, ref, mine)


def prompt_parts(
    job: Job, ref: SceneRef, source_key: str, grounder: Scene | DetectorScene | None
) -> dict[str, Any]:
    """Return everything that the prompts depend on."""
    options = job.prompts
    fields = ("text", "threshold", "crs", "layer", "polygons", "earlier_ids", "names", "everything", "grid")
    labels = find_labels(options.earlier, ref.name) if options.earlier else ""
    return {
        "options": options.model_dump(mode="json", include={*fields}), "source": source_key,
        "smallest": job.measure.smallest, "file": file_fingerprint(options.path) if options.path else "",
        "earlier": labels_identity(labels, job.identity) if labels else {},
        "grounder": _grounder_key(grounder), "version": ANSWER_VERSION,
    }  # fmt: skip


def _grounder_key(grounder: Scene | DetectorScene | None) -> str:
    """What finds the phrases, its class names and synonyms included."""
    if grounder is None:
        return ""
    if isinstance(grounder, DetectorScene):
        return grounder.stage.key
    words = [c.model_dump(mode="json", exclude={"color"}) for c in grounder.card.classes]
    return stage_key("words", {"of": grounder.predict.key, "classes": words})


def check_prompts(job: Job) -> Card:
    """Check a job with prompts before any work starts; return its model's card with the bands that are shown.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    card, options = prompted_card(job), job.prompts
    if card.output.kind != "prompted":
        raise RequestError(
            f"model: {card.name!r} is a {card.output.kind} model, which takes no prompts: give a promptable "
            "one (output.kind: prompted), and this one as `prompts.grounder`"
        )
    check_segmenter(card)
    _check_unused(job)
    if options.text:
        parse_phrases(options.text)
    semantic_or_boxes = "a semantic one, or a detector that takes text (output.kind: boxes)"
    for field, path, kinds, valid in (
        ("grounder", options.grounder, ("semantic", "boxes"), semantic_or_boxes),
        ("labeller", options.labeller, ("names",), "a CLIP (output.kind: names)"),
    ):
        if path:
            other = read_card(path)
            kind = other.output.kind
            if kind not in kinds:
                raise RequestError(f"prompts.{field}: {other.name!r} is a {kind} model; valid: {valid}")
            check_model(other)
    if options.path:
        file_fingerprint(options.path)
    return card


def check_model(card: Card) -> None:
    """Refuse a card that could not run, whether it answers prompts or not (`check_card`).

    Raises:
        RequestError: names the card, the field, what was found and what would be valid.
    """
    if not card.answers_prompts:
        check_card(card)
    elif card.output.kind == "boxes":
        from segpipe.prompts.grounding.detectors import check_detector

        check_detector(resolve_weights(card))
    elif card.output.kind == "names":
        from segpipe.prompts.grounding.processors import read_kind

        read_kind(resolve_weights(card), ("clip",))
    else:
        resolve_weights(card)
        check_segmenter(card)


def describe_model(card: Card) -> ModelDescription:
    """Facts of a model that are not written on its card, of those that answer prompts too.

    Raises:
        RequestError: as `segpipe.models.registry.load_model` or `load_segmenter`.
    """
    if card.output.kind != "prompted":
        return describe(card)
    import torch

    return describe(card, load_segmenter(card, torch.device("cpu")).parameters)


def _check_unused(job: Job) -> None:
    """Reject what a promptable model has no use for; it is never ignored."""
    for field, given in {
        "tiling.window": job.tiling.window != "auto",
        "tiling.halo": job.tiling.halo != "auto",
        "tiling.blend": job.tiling.blend is not Blend.trim,
        "compute.tta": job.compute.tta is not TTA.none,
        "compute.compile": job.compute.compile,
        "outputs.scores": job.outputs.scores,
        "outputs.uncertainty": job.outputs.uncertainty,
    }.items():
        if given:
            raise RequestError(f"{field}: a promptable model has no use for it: leave it out")

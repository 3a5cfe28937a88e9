"""The command ``segpipe models``: list, show, import and export model cards.

As fast to answer as the rest of the command line: what loads torch is imported by the command that needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from segpipe.cli.output import echo
from segpipe.config.builtin import card_files, find_card

if TYPE_CHECKING:
    from segpipe.config.card import Card

models_app = typer.Typer(help="List model cards, or show one.", invoke_without_command=True)
NameOrPath = Annotated[str, typer.Argument(help="Name of a card that `segpipe models` lists, or its path.")]


@models_app.callback()
def _models(
    context: typer.Context,
    folder: Annotated[
        str, typer.Option(help="Folder of cards; left out: configs/models, and those that come with segpipe.")
    ] = "",
) -> None:
    if context.invoked_subcommand is not None:
        return
    from segpipe.models.registry import list_cards

    table = Table("name", "kind", "provider", "classes", "title")
    where = folder or None
    for name, card in zip(card_files(where), list_cards(where), strict=True):
        names = ", ".join(c.name for c in card.classes)
        table.add_row(name, card.kind, card.provider, names, card.title)
    Console().print(table)


@models_app.command("show")
def show(
    name: NameOrPath,
    reach: Annotated[
        bool, typer.Option(help="Also measure how far the model looks (seconds to minutes).")
    ] = False,
) -> None:
    """Show a model card with its size, window, halo and what a forward pass costs."""
    from segpipe.config.card import load_card

    card = load_card(name)
    if card.answers_prompts:  # other models need nothing of what prompts need
        from segpipe.prompts.prompt_scene import check_model, describe_model
    else:
        from segpipe.models.registry import check_card as check_model
        from segpipe.models.registry import describe as describe_model
    check_model(card)
    facts = describe_model(card)
    table = Table(show_header=False, title=card.title or card.name)
    rows: dict[str, Any] = {
        "name": card.name,
        "provider": f"{card.provider} {card.architecture or ''}",
        "parameters": "not told by the file" if facts.parameters is None else f"{facts.parameters:,}",
        "weights": f"{card.weights} ({facts.weights_bytes / 1e6:.1f} MB, sha256 {facts.fingerprint[:16]}…)",
        "window": "whole scene" if facts.window is None else "x".join(map(str, facts.window)),
        "halo": "measured when first needed" if facts.halo is None else "x".join(map(str, facts.halo)),
        "total stride": facts.stride,
        "forward pass": "not told by the file" if facts.flops is None else _cost(card, facts.flops),
        "input": ", ".join(card.input.bands) or card.input.modality or "one channel",
        "classes": ", ".join(f"{c.value} {c.name}" for c in card.classes),
        "data": card.data,
        "scores": card.scores,
        "limits": card.limits,
        "licence": card.licence,
    }
    if reach:
        rows |= _reach_rows(card)
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)


def _reach_rows(card: Card) -> dict[str, Any]:
    """How far the model looks, and what smaller halos would change."""
    from segpipe.inference.receptive_field.reach import card_reach

    if card.window_shape is None or card.output.kind != "semantic":
        return {"reach": "of semantic models with windows only"}
    found = card_reach(card, card.window_shape, "runs")
    seams = ", ".join(f"{halo}: {share:.2%}" for halo, share, _ in found.seams)
    return {
        "reach": found.note,
        "halo, measured": "x".join(map(str, found.halo)),
        "class changes by halo": seams,
    }


@models_app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A folder that nnU-Net trained, or a MONAI bundle (folder or zip).")
    ],
    out: Annotated[Path, typer.Option(help="The card to write, e.g. configs/models/spleen.yaml.")],
    configuration: Annotated[str, typer.Option(help="Of an nnU-Net folder.")] = "3d_fullres",
) -> None:
    """Write the card of a model that another tool trained; the model itself stays where it is."""
    import yaml

    from segpipe.config.card import load_card
    from segpipe.models.providers.bundle.files import card_from_bundle
    from segpipe.models.providers.nnunet.plans import card_from_nnunet
    from segpipe.models.registry import check_card

    nnunet = (source / "plans.json").is_file()
    card = card_from_nnunet(source, configuration) if nnunet else card_from_bundle(source)
    fields = card.model_dump(mode="json", exclude_defaults=True)
    fields["weights"] = os.path.relpath(source.resolve(), out.resolve().parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100), encoding="utf-8")
    check_card(load_card(out))
    echo(f"{out}: look it over, most of all classes, normalisation and limits")


@models_app.command("export")
def export(
    name: NameOrPath,
    out: Annotated[Path, typer.Option(help="Folder of the new card and its file.")],
    to: Annotated[str, typer.Option(help="onnx, or int8 (for CPUs).")] = "onnx",
    job_file: Annotated[
        Path | None, typer.Option("--job", help="Job whose scenes are compared on; its reference gives mIoU.")
    ] = None,
    method: Annotated[str, typer.Option(help="Of int8: static or dynamic.")] = "static",
) -> None:
    """Convert a model to ONNX or int8, hold it against the first, and print difference, speed and mIoU."""
    from segpipe.config.job import load_job
    from segpipe.convert.command import export_model

    job = load_job(job_file) if job_file is not None else None
    for line in export_model(find_card(name), to, out, job, method):
        echo(line)


def _cost(card: Card, flops: float) -> str:
    """Work and memory of a forward pass, for people."""
    what = "megapixel" if card.kind == "raster" else "million voxels"
    return f"{flops / 1e3:,.0f} GFLOP per {what}; about {card.window.forward_bytes} bytes per element"

"""Kinds of values that every configuration is made of: strict models, sizes and texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_text(value: object) -> object:
    """YAML reads ``512`` as a number; the field is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


SIZE = r"(\d+|\d+x\d+|\d+x\d+x\d+)"
AutoSize = Annotated[str, BeforeValidator(as_text), Field(pattern=rf"^(auto|{SIZE})$")]
"""``auto``, one number for all axes, or one per axis in array order: ``512``, ``96x128x128``."""
WindowSize = Annotated[str, BeforeValidator(as_text), Field(pattern=rf"^(auto|whole|{SIZE})$")]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""Text that may be left out, empty or null. A form shows a plain box, where a union would be two tabs."""
Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s?(MiB|GiB|TiB)$")]


class Strict(BaseModel):
    """Unknown keys are mistakes; values don't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_enum_values=False)

"""The form of the prompt flow: a job's fields in the order in which one asks."""

from __future__ import annotations

from pydantic import Field

from segpipe.config.job import (
    BandsField,
    Compute,
    ComputeField,
    DescriptionField,
    Job,
    Measure,
    MeasureField,
    NameField,
    Outputs,
    OutputsField,
    ReferenceField,
    RegionsField,
    ScenesField,
    Tiling,
)
from segpipe.config.prompts import PromptOptions
from segpipe.config.types import Strict


class Question(Strict):
    """Which scenes, which promptable model, and what it is asked.

    Required: `scenes`, `model`, and under `prompts` any of `text`, `path`, `earlier` and `everything`.
    """

    scenes: ScenesField
    model: str = Field(
        min_length=1, description="Card of a promptable model, by path or name, e.g. starter-sam."
    )
    prompts: PromptOptions = Field(description="What is asked.")
    name: NameField = "prompt"
    bands: BandsField = Field(default_factory=list)
    regions: RegionsField = None
    reference: ReferenceField = None
    outputs: OutputsField = Field(default_factory=Outputs)
    description: DescriptionField = ""
    measure: MeasureField = Field(default_factory=Measure)
    compute: ComputeField = Field(default_factory=Compute)
    tiling: Tiling = Field(
        default_factory=Tiling, description="How a scene is cut; here only `block` and `memory`."
    )

    @property
    def job(self) -> Job:
        """The job that this is."""
        return Job.model_validate(self.model_dump())

    @classmethod
    def of(cls, job: Job) -> Question:
        """A job with prompts as a question.

        Args:
            job: with a promptable model.
        """
        return cls.model_validate(job.model_dump(include=set(cls.model_fields)))

"""The form of the prompt flow: a job's fields in the order in which one asks."""

from __future__ import annotations

from pydantic import Field

from segpipe.config import Compute, Job, Measure, Outputs, Reference, Regions, Tiling
from segpipe.fields import Strict
from segpipe.prompts.options import PromptOptions


class Question(Strict):
    """Which scenes, which promptable model, and what it is asked.

    Required: `scenes`, `model`, and under `prompts` any of `text`, `path`, `earlier` and `everything`.
    """

    scenes: list[str] = Field(min_length=1, description="Files, globs, folders or URLs.")
    model: str = Field(
        min_length=1, description="Card of a promptable model, e.g. configs/models/starter-sam.yaml."
    )
    prompts: PromptOptions = Field(description="What is asked.")
    name: str = Field(
        "prompt",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Names the folder of the results.",
    )
    bands: list[str] = Field(
        default_factory=list,
        description="Names of the scene's bands in file order, where the file has none.",
    )
    regions: Regions | None = Field(None, description="Where numbers are reported; empty: the whole scene.")
    reference: Reference | None = Field(None, description="The truth to compare with.")
    outputs: Outputs = Field(default_factory=Outputs, description="What is written, and where.")
    description: str = Field("", description="What the reader of the report should know.")
    measure: Measure = Field(default_factory=Measure, description="Further measurements.")
    compute: Compute = Field(default_factory=Compute, description="Where and how the model runs.")
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

"""What can be scheduled and triggered: one table, which `segpipe serve` uses and infra/prefect.yaml repeats.

Nothing of Prefect is loaded here: a program sets PREFECT_API_URL first and imports the flows after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Deployment:
    """A flow as the Prefect UI offers it."""

    name: str
    """Of the deployment and of its flow."""
    entrypoint: str
    """Module and function: a path would load the module a second time, with second caches."""
    description: str
    tags: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the form is filled with at first: the examples of `make demo-data`."""


_LANDSAT = ".demo/landsat/landsat7_2000.tif"
_BANDS = ["blue", "green", "red", "nir", "swir16"]

DEPLOYMENTS = (
    Deployment(
        "segment",
        "segpipe_flows.segment.segment",
        "Segment scenes and report areas, volumes and overlap per region.",
        ("segpipe", "raster", "volume"),
        {
            "job": {
                "name": "landcover",
                "scenes": [_LANDSAT],
                "model": "configs/models/landcover-unet.yaml",
                "bands": _BANDS,
            }
        },
    ),
    Deployment(
        "scan",
        "segpipe_flows.scan.scan",
        "Find what is new in a lake and segment each scene once.",
        ("segpipe", "lake"),
        {
            "scan": {
                "name": "nightly",
                "lake": {"location": "lake", "pattern": "**/*.tif"},
                "model": "configs/models/landcover-unet.yaml",
                "bands": _BANDS,
            }
        },
    ),
    Deployment(
        "prompt",
        "segpipe_flows.prompt.prompt",
        "Ask a promptable model for objects, in words, by points or by boxes.",
        ("segpipe", "promptable"),
        {
            "question": {
                "name": "lakes",
                "scenes": [_LANDSAT],
                "model": "configs/models/starter-sam.yaml",
                "bands": _BANDS,
                "prompts": {
                    "text": ["lakes and reservoirs"],
                    "grounder": "configs/models/landcover-unet.yaml",
                    "bands": ["nir", "green", "red"],
                },
            }
        },
    ),
    Deployment(
        "train",
        "segpipe_flows.train.train_model",
        "Train a model from labelled scenes and write its card.",
        ("segpipe", "training"),
        {"recipe": "configs/train/landcover-unet.yaml", "changes": []},
    ),
    Deployment(
        "compare",
        "segpipe_flows.compare.compare",
        "Tell what changed from one run to another, per scene, region and class.",
        ("segpipe", "report"),
        {"out": ""},
    ),
)

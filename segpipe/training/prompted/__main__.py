"""``python -m segpipe.training.prompted RECIPE [--set a.b=value …] [--export]``."""

from __future__ import annotations

import argparse
import sys

from segpipe.errors import RequestError, SceneError
from segpipe.training.prompted.recipe import load_prompted_recipe
from segpipe.training.prompted.run import Line, PromptedTraining


def main() -> int:
    """Train, or export what the last checkpoint holds."""
    parser = argparse.ArgumentParser(description="Train a small promptable model.")
    parser.add_argument("recipe", help="YAML file, e.g. configs/train/prompted/starter-sam.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    parser.add_argument(
        "--export", action="store_true", help="write the weights of the last checkpoint, and end"
    )
    given = parser.parse_args()
    try:
        training = PromptedTraining(load_prompted_recipe(given.recipe, given.set))
        if given.export:
            if not training.progress.step:
                raise RequestError(f"{training.checkpoint}: no checkpoint; train first, without --export")
            sys.stdout.write(f"{training.export()}: weights of step {training.progress.step}\n")
            return 0
        training.run(tell)
        sys.stdout.write(f"done: {training.recipe.export}\n")
    except (RequestError, SceneError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def tell(line: Line) -> None:
    """A line of progress."""
    sys.stdout.write(
        f"step {line.step}: loss {line.loss:.3f}, IoU with box {line.box:.3f}, with point {line.point:.3f}, "
        f"corrected {line.again:.3f}, {line.seconds / 60:.1f} min\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""The process of one target: libFuzzer's loop (`python -m tools.fuzz.child NAME OPTIONS FOLDERS`)."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from random import Random

import atheris

NOWHERE = "http://127.0.0.1:9"
"""A proxy that nobody runs: no target reaches anything."""
MEMORY = 3 * 2**30
"""What a reader process may have, or somewhat less."""


def signature(error: BaseException) -> str:
    """Name a finding by its kind, and by the place in segpipe that let it through."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    own = [f for f in frames if "/segpipe/" in f.filename] or frames
    text = f"{Path(own[-1].filename).stem}-{own[-1].name}" if own else ""
    return f"traceback-{type(error).__name__}-{text}"


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    os.environ |= {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "ALL_PROXY": NOWHERE}
    logging.disable()
    # Nothing of segpipe is imported before, or its branches would not count.
    with atheris.instrument_imports(include=["segpipe", "nibabel", "pydicom", "pystac"]):
        from segpipe.process.sandbox import limit_memory
        from segpipe.sources.readers import TRUSTED
        from tools.fuzz.mutate import mutate
        from tools.fuzz.target import execute
        from tools.fuzz.targets import TARGETS, inputs_of

        os.environ[TRUSTED] = "1"
        target = TARGETS[name]
        for path in inputs_of(name):  # imports what the target imports, so that it is instrumented
            try:
                execute(target, path.read_bytes())
            except Exception as error:  # noqa: BLE001  is found again below, and kept there
                print(f"{path}: {type(error).__name__}", file=sys.stderr)
    prefix = next(o.partition("=")[2] for o in options if o.startswith("-artifact_prefix="))
    if target.walled:
        limit_memory(MEMORY)

    kept: set[Path] = set()

    def test(data: bytes) -> None:
        try:
            execute(target, data)
        except Exception as error:  # noqa: BLE001  whatever no reader names is what is looked for
            path = Path(f"{prefix}{signature(error)}")
            if path not in kept:
                path.write_bytes(data)
                kept.add(path)

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        found = atheris.Mutate(data, most) if random.random() < 0.3 else mutate(data, target.form, random)
        return found[:most]

    atheris.Setup([sys.argv[0], *options], test, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Write the digests of images that are not ours behind their tags, in every file of infra/ that names them.

``python -m infra.pin_images`` asks Docker, which asks the registries; ``--check`` asks nobody and lists what
has no digest. Exit code 0: all have one; 1: some have none, or a digest could not be had.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
IMAGE = re.compile(
    r"(?P<before>^\s*FROM |^# syntax=|\bimage: (?:&[\w-]+ )?(?:\$\{\w+:-)?)"
    r"(?P<name>(?!segpipe-)[a-z0-9][a-z0-9./_-]*:[\w][\w.-]*)(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.M,
)
"""An image with a tag, in a Dockerfile or in YAML; ours are named by their version and built from here."""


def files(folder: Path = FOLDER) -> list[Path]:
    """Every file that may name an image."""
    return sorted([*folder.rglob("Dockerfile"), *folder.rglob("*.yaml")])


def unpinned(text: str) -> list[str]:
    """Images of a file that have no digest."""
    return [found["name"] for found in IMAGE.finditer(text) if not found["digest"]]


def pin(text: str, digests: dict[str, str]) -> str:
    """The text with a digest behind each image, in place of the one it had."""
    return IMAGE.sub(lambda found: f"{found['before']}{found['name']}@{digests[found['name']]}", text)


def ask(image: str) -> str:
    """The digest of the image for all its platforms, as its registry has it now.

    Raises:
        SystemExit: Docker is missing, or the registry does not answer.
    """
    docker = shutil.which("docker")
    if docker is None:
        raise SystemExit(f"{image}: docker is not installed, and it asks the registry for the digest")
    command = [docker, "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not DIGEST.fullmatch(done.stdout.strip()):
        raise SystemExit(f"{image}: no digest: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="list what has no digest")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args(arguments)
    texts = {path: path.read_text() for path in files(asked.folder)}
    if asked.check:
        missing = [(path, name) for path, text in texts.items() for name in unpinned(text)]
        for path, name in missing:
            sys.stdout.write(f"{path.relative_to(asked.folder)}: {name} has no digest\n")
        return bool(missing)
    digests = {
        name: ask(name) for name in sorted({i["name"] for t in texts.values() for i in IMAGE.finditer(t)})
    }
    for path, text in texts.items():  # all digests are there: every file is written or none
        if (pinned := pin(text, digests)) != text:
            path.write_text(pinned)
            sys.stdout.write(f"{path.relative_to(asked.folder)}: pinned\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

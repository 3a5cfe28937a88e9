"""Ask an HTTP address whether it is well: the containers' health check, and what waits for the server.

``health.py`` asks the address that the entry point wrote down; ``health.py URL --wait 120`` asks until
it answers. Exit code 0: it answered 200; 1: it did not.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

EVERY = 0.5
"""Seconds between two questions."""
TIMEOUT = 5.0


def problem(url: str) -> str:
    """What is wrong with the answer; empty: nothing."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return "" if response.status == 200 else f"answered {response.status}"
    except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
        return str(error)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", help="left out: the one the entry point wrote down")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="ask again until then")
    asked = parser.parse_args()
    noted = Path(os.environ.get("SEGPIPE_HEALTH_FILE") or Path(tempfile.gettempdir()) / "segpipe-health")
    try:
        url = asked.url or noted.read_text().strip()
    except OSError as error:
        sys.stderr.write(f"no entry point has started here: {error}\n")
        return 1
    end = time.monotonic() + asked.wait
    while (wrong := problem(url)) and time.monotonic() < end:
        time.sleep(EVERY)
    if wrong:
        sys.stderr.write(f"{url}: {wrong}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Signals of processes that tests start."""

from __future__ import annotations

import signal


def enable_ctrl_c() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

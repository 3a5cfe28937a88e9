"""Errors that a user can act on: each names the file or field, what was found, and what would be valid."""

from __future__ import annotations

from segpipe.redact import clean


class SegpipeError(Exception):
    """Base of every error that is shown as one line, without a traceback. It tells no secret."""

    def __init__(self, *told: object) -> None:
        super().__init__(*(clean(text) if isinstance(text, str) else text for text in told))


class RequestError(SegpipeError):
    """The request itself is wrong (config, card, paths): nothing is started. Exit code 2."""


class SceneError(SegpipeError):
    """One scene cannot be processed: it fails, the others go on. Exit code 1."""


class DamagedError(SceneError):
    """What lies in the store is not what was committed: it is computed again by the next run."""


class FullError(SegpipeError):
    """A disk is full: the run stops, and goes on from what is committed once there is room. Exit code 1."""


class StoppedError(SegpipeError):
    """The run was asked to stop. Everything committed so far stays; running again resumes."""


class LeaseLostError(StoppedError):
    """Another process has taken over what this one was at: this one writes nothing more of it."""


class DeviceMemoryError(Exception):
    """The device ran out of memory at this batch size; the scene restarts under half of it."""

    def __init__(self, batch: int) -> None:
        super().__init__(f"out of device memory with {batch} windows in a batch")
        self.batch = batch

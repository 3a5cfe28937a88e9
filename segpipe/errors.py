"""Errors that a user can act on: each names the file or field, what was found, and what would be valid."""


class SegpipeError(Exception):
    """Base of every error that is shown as one line, without a traceback."""


class RequestError(SegpipeError):
    """The request itself is wrong (config, card, paths): nothing is started. Exit code 2."""


class SceneError(SegpipeError):
    """One scene cannot be processed: it fails, the others go on. Exit code 1."""


class StoppedError(SegpipeError):
    """The run was asked to stop. Everything committed so far stays; running again resumes."""

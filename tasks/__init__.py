"""Prefect tasks: one per step, each a thin wrapper over one segpipe call."""

from segpipe.redact import clean_logs

clean_logs()

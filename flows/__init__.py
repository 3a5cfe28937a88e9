"""Prefect flows: what can be scheduled and triggered."""

from segpipe.redact import clean_logs

clean_logs()

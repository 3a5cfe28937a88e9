"""Prefect tasks: one per step, each a thin wrapper over one segpipe call."""

"""Prefect flows: what can be scheduled and triggered."""

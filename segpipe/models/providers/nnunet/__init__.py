"""Folders that nnU-Net v2 trained."""

from segpipe.models.providers.nnunet.network import build, check

__all__ = ["build", "check"]

"""MONAI bundles, of which only the definition of the network is read."""

from segpipe.models.providers.bundle.network import build, check

__all__ = ["build", "check"]

"""Folders that nnU-Net v2 trained."""

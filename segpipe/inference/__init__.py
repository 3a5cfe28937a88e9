"""The engine: read, normalise, forward, stitch, write, overlapped."""

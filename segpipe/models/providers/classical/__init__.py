"""Classical segmentation as models: no network, and the floor that every network must beat.

`otsu`, `multi-otsu`, `region-growing`, `watershed`, `graph-cut` and `normalised-cut` need no labels;
`random-forest` (`forest.py`) is fitted to some.
"""

"""From slices to solids: masks propagated through a volume."""

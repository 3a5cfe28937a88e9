"""Where things are: boxes, affine, CRS, areas, and maps between two grids."""

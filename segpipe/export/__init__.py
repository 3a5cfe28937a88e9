"""Files for people: COG for rasters, NIfTI for volumes, on the scene's native grid."""

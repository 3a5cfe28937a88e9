"""MONAI bundles, of which only the definition of the network is read."""

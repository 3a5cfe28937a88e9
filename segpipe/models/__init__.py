"""Models behind one card: nothing outside this package knows a model by name."""

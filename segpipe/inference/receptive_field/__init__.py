"""How far a model looks, measured, and the halo that follows from it."""

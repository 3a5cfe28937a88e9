"""Training: from labelled scenes to a model card with weights, scores and where they come from."""

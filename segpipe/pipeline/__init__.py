"""The steps of one scene: plan, predict, join objects, measure."""

"""Windows, blocks, plan and memory: pure functions on integers."""

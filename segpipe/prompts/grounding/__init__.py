"""Text to boxes: vocabularies, detectors, and merging of what they find."""

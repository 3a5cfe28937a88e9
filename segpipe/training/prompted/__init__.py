"""Training of a small promptable model: drawn shapes and labelled scenes in, a folder of the library out."""

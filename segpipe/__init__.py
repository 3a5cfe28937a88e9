"""segpipe: segmentation over lakes of large rasters and 3D volumes, and the numbers that follow."""

from segpipe.allocator import use_huge_pages
from segpipe.drivers import skip_other_drivers

__version__ = "0.1.0"

ENGINE_VERSION = 2
"""Raised only when the same inputs give other bits; part of every predict key."""
ANSWER_VERSION = 2
"""The same of answers to prompts and the objects they become."""

use_huge_pages()
skip_other_drivers()

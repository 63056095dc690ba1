"""clipscale: CLIP image-text pretraining at very large batches, exact and in constant memory.

`from clipscale import GradCache`: gradient caching in a training loop of one's own (library.py).
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """What a program of one's own imports from here, loaded when it is asked for: it needs torch."""
    if name == "GradCache":
        return importlib.import_module("clipscale.library").GradCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

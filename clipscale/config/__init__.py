"""Every setting, from YAML and command-line words to frozen dataclasses and back. No torch import.

    config = load_config(["quickstart", "optim.lr=1e-3"])        # load.py

`settings.py` and `data.py` have the settings and their rules, `read.py` reads YAML and words, `load.py` merges them,
`help.py` explains each setting, `recipes.py` finds the configs that come along.
"""

from clipscale.config.settings import (
    EVALUATIONS,
    Checkpoint,
    Config,
    Eval,
    GradCache,
    Loss,
    Model,
    Optim,
    Preprocess,
    Retrieval,
    Run,
    Train,
    Validation,
    ZeroShot,
    flat,
)

__all__ = [
    "EVALUATIONS",
    "Checkpoint",
    "Config",
    "Eval",
    "GradCache",
    "Loss",
    "Model",
    "Optim",
    "Preprocess",
    "Retrieval",
    "Run",
    "Train",
    "Validation",
    "ZeroShot",
    "flat",
]

"""Every setting, from YAML and command-line words to frozen dataclasses and back. No torch import.

    config = load_config(["quickstart", "optim.lr=1e-3"])        # load.py

`settings.py`, and `data.py`, `model.py`, `optim.py` and `evaluation.py` for those parts, have the settings and their
rules, `read.py` reads YAML and words, `load.py` merges them, `help.py` explains each setting, `recipes.py` finds the
configs that come along.
"""

from clipscale.config.evaluation import EVALUATIONS, Eval, Retrieval, Validation, ZeroShot
from clipscale.config.model import Model, Preprocess
from clipscale.config.optim import Optim
from clipscale.config.settings import Checkpoint, Config, GradCache, Lock, Loss, Run, Train, flat

__all__ = [
    "EVALUATIONS",
    "Checkpoint",
    "Config",
    "Eval",
    "GradCache",
    "Lock",
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

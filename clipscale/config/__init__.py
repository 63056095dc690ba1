"""Every setting, from YAML and command-line words to frozen dataclasses and back. No torch import.

    config = load_config(["quickstart", "optim.lr=1e-3"])        # load.py

`settings.py`, and `data.py`, `model.py`, `towers.py`, `optim.py` and `evaluation.py` for those parts, have the settings
and their rules, `read.py` reads YAML and words, `load.py` merges them, `help.py` explains each setting, `recipes.py`
finds the configs that come along.
"""

from clipscale.config.evaluation import AVERAGE_PREFIX, EVALUATIONS, Eval, Retrieval, Validation, ZeroShot
from clipscale.config.model import Model, Preprocess
from clipscale.config.optim import Optim
from clipscale.config.settings import Checkpoint, Config, Ema, GradCache, Lock, Loss, Run, Train, Wandb, flat
from clipscale.config.towers import AS_OPEN_CLIP, TowerSettings

__all__ = [
    "AS_OPEN_CLIP",
    "AVERAGE_PREFIX",
    "EVALUATIONS",
    "Checkpoint",
    "Config",
    "Ema",
    "Eval",
    "GradCache",
    "Lock",
    "Loss",
    "Model",
    "Optim",
    "Preprocess",
    "Retrieval",
    "Run",
    "TowerSettings",
    "Train",
    "Validation",
    "Wandb",
    "ZeroShot",
    "flat",
]

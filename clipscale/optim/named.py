"""Settings that name parameters or layers, tried on the model before data are read.

check_named(config)          # or a UserError, such as for a pattern that matches nothing
"""

from __future__ import annotations

from clipscale.config import Config
from clipscale.optim.groups import parameter_groups
from clipscale.optim.lock import lock_towers
from clipscale.towers import build_towers


def check_named(config: Config) -> None:
    """The towers are built without memory, on the device "meta".

    Raises:
        UserError: as `lock_towers` and `parameter_groups`.
    """
    towers = build_towers(config.model, device="meta")
    lock_towers(towers, config.train.lock)
    parameter_groups(towers.model, config.optim)

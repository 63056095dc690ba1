"""An exponential moving average of the weights that are trained, by samples: a change of the batch keeps its horizon.

    ema = Ema(config, towers.model)
    ema.begin(snapshot)                        # from the checkpoint's, or from the weights as they are
    ema.update(samples=4096)                   # after each step
    for prefix, weights in ema.evaluated():    # ("", ...), ("ema/", ...)
        with weights:                          # within, the model has those
            ...

After half_life_samples a step's weights count half as much. At first the half-life is a share of the samples seen, so
that fresh weights are soon forgotten (Karras et al., arXiv 2206.00364, whose code has it as the ramp-up ratio).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipscale.checkpoint import Snapshot
from clipscale.config import AVERAGE_PREFIX, Config
from clipscale.config import Ema as Settings
from clipscale.tell import tell
from clipscale.words import counted


class Ema:
    """One rank's; the same on every rank, without a word between them. Of a run that averages nothing: nothing."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self._settings, self._batch = config.ema, config.train.global_batch
        named = model.named_parameters() if self._settings.enabled else []
        self._weights = {name: weight for name, weight in named if weight.requires_grad}
        self.averages: dict[str, Tensor] = {}
        """By the weights' names, each of its weight's shape, type and device."""

    def begin(self, snapshot: Snapshot | None) -> None:
        """Take over a checkpoint's averages; without one, or of a weight that it has none of, begin with the weight."""
        found = snapshot.ema if snapshot else {}
        for name, weight in self._weights.items():
            self.averages[name] = found.get(name, weight.detach()).to(weight.device, copy=True)
        fresh = len(self._weights.keys() - found.keys())
        if snapshot and fresh:
            tell(f"ema: the checkpoint has no average of {counted(fresh, 'tensor')}, which begin as they are now")
        if found and not self._settings.enabled:
            tell("warning: the checkpoint's averaged weights are dropped: ema.half_life_samples=0")
        elif locked := len(found.keys() - self._weights.keys()):
            tell(f"warning: the checkpoint's averages of {counted(locked, 'tensor')} are dropped: train.lock")

    def update(self, *, samples: int) -> None:
        """After the step that ends with so many samples seen."""
        if self.averages:
            average = get_ema_multi_avg_fn(decay(self._settings, samples=samples, batch=self._batch))
            average(list(self.averages.values()), list(self._weights.values()), None)

    def evaluated(self) -> list[tuple[str, AbstractContextManager]]:
        """What an evaluation is made of: what its columns begin with, and within which the model has the weights."""
        if not self.averages:
            return [("", nullcontext())]
        return [("", nullcontext())] * (self._settings.evaluate == "both") + [(AVERAGE_PREFIX, self._applied())]

    @contextmanager
    def _applied(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Weights and averages change places; nothing is copied."""
        for name, weight in self._weights.items():
            weight.data, self.averages[name] = self.averages[name], weight.data


def decay(settings: Settings, *, samples: int, batch: int) -> float:
    """The share of the average that a step of `batch` keeps, when `samples` have been seen with it."""
    half_life = settings.half_life_samples
    if settings.ramp_up > 0:
        half_life = min(half_life, settings.ramp_up * samples)
    return 0.5 ** (batch / half_life)

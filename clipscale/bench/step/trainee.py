"""What all contestants train, in turn: one model with one optimizer, on one batch.

    trainee = build_trainee("small", device=device, precision="fp32", seed=0)
    batch = draw_batch(trainee, 512, lengths, distinct=512, seed=0)
    trainee.begin()
    ...                                # gradients
    trainee.finish()
    trainee.restore()                  # to the weights it had at first

One for all, so that every contestant has the same weights and memory beside its own. The gradients are gone before a
step begins, as in any trainer; AdamW steps with lr 5e-4 and eps 1e-6.

Shapes: N pairs, S side of a picture, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipscale.bench.common.memory import begin_part
from clipscale.bench.step.captions import Lengths, draw_captions
from clipscale.bench.step.options import SMALL
from clipscale.config import Model, Optim
from clipscale.config.load import load_config
from clipscale.config.recipes import list_recipes
from clipscale.counter import fold
from clipscale.optim import build_optimizer
from clipscale.towers import Towers, autocast_dtype, build_towers
from clipscale.upstream.open_clip_files import known_models

OPTIM = Optim(lr=5e-4, eps=1e-6)
_SMALL = Model(
    embed_dim=192,
    vision={"image_size": 112, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    text={"context_length": 77, "width": 192, "heads": 3, "layers": 6},
)


@dataclass
class Trainee:
    towers: Towers
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Enabled in fp16 only."""
    precision: str
    """fp32, bf16 or fp16."""
    weights: dict[str, Tensor]
    """Those at first, in host memory."""

    @property
    def device(self) -> torch.device:
        return self.towers.image.device

    def begin(self) -> None:
        """Before the gradients of a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self, clip: float | None = None) -> None:
        """After them: the optimizer's step, and a logit scale that is held. `clip`: the gradient's largest norm."""
        begin_part("optimizer")
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.towers.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.towers.clamp_logit_scale()

    def restore(self) -> None:
        """The first weights, and an optimizer that has seen nothing."""
        self.begin()
        self.restore_weights()
        self.optimizer.state.clear()

    def restore_weights(self) -> None:
        """Noise is no data: hundreds of steps on it lead nowhere, perhaps to numbers that are not finite."""
        self.towers.model.load_state_dict(self.weights)

    def tensors(self) -> Iterable[Tensor]:
        """All that is there between two steps."""
        yield from self.towers.model.parameters()
        yield from self.towers.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Batch:
    """In host memory, page-locked for a GPU."""

    images: Tensor
    """uint8 [N, 3, S, S]; picture i + `distinct` is picture i."""
    tokens: Tensor
    """int64 [N, L]."""
    distinct: int

    def __len__(self) -> int:
        return len(self.images)

    def first(self, pairs: int) -> Batch:
        return Batch(self.images[:pairs], self.tokens[:pairs], self.distinct)


def model_config(name: str) -> Model:
    """Of an open_clip model, a recipe, or the small one. UserError for a name that is none of them."""
    if name == SMALL:
        return _SMALL
    if name in list_recipes() and name not in known_models():
        return load_config([name]).model
    return Model(name=name)


def build_trainee(model: Model, *, device: torch.device, precision: str, seed: int) -> Trainee:
    """With fresh weights. `precision`: fp32, bf16 or fp16. UserError for a model that cannot be built."""
    autocast = autocast_dtype(precision, device)
    towers = build_towers(model, device=device, autocast=autocast, seed=seed)
    towers.model.train()
    return Trainee(
        towers,
        build_optimizer(towers.model, OPTIM),
        torch.amp.GradScaler(device.type, enabled=autocast == torch.float16),
        precision,
        {name: value.detach().cpu().clone() for name, value in towers.model.state_dict().items()},
    )


def draw_batch(trainee: Trainee, pairs: int, lengths: Lengths, *, distinct: int, seed: int) -> Batch:
    """Captions of drawn lengths, and noise for pictures, of which the first `distinct` come again and again."""
    towers, pin = trainee.towers, trainee.device.type == "cuda"
    images = torch.empty(pairs, 3, towers.image_size, towers.image_size, dtype=torch.uint8, pin_memory=pin)
    images[:distinct].random_(0, 256, generator=torch.Generator().manual_seed(_key(seed, "pictures")))
    for start in range(distinct, pairs, distinct):
        images[start : start + distinct] = images[: min(distinct, pairs - start)]
    tokens = draw_captions(
        lengths, pairs, length=towers.context_length, vocabulary=towers.vocabulary, seed=_key(seed, "captions")
    )
    return Batch(images, tokens.pin_memory() if pin else tokens, distinct)


def batch_bytes(trainee: Trainee, pairs: int) -> int:
    """Of the pictures of a batch, in host memory."""
    return pairs * 3 * trainee.towers.image_size**2


def _key(seed: int, what: str) -> int:
    """31 bits, all that every generator takes."""
    return fold(seed, "bench step", what) & (2**31 - 1)

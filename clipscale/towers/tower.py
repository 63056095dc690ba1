"""One tower behind one door: a chunk of raw inputs in, L2-normalised embeddings out.

Shapes: M chunk, D width of the embedding, S side of a picture, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.errors import UserError
from clipscale.towers.captions import CaptionCut
from clipscale.towers.draws import drawing


class Tower:
    """Raw inputs [M, ...] on the tower's device -> embeddings [M, D], float32 (float64 for a float64 tower).

    Args:
        name: "image" or "text".
        encoder: module from prepared inputs to features [M, D].
        prepare: raw inputs (pixels, token ids), dtype of the encoder's first product -> what the encoder takes.
        autocast: dtype of the encoder's matrix products, or None for that of its weights.
        cut: how the encoder takes captions that are cut at their end; None: it takes full ones only.
        draw_key: of its draws by position (draws.py).
    """

    def __init__(
        self,
        name: str,
        encoder: nn.Module,
        prepare: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
        autocast: torch.dtype | None = None,
        cut: CaptionCut | None = None,
        draw_key: int = 0,
    ) -> None:
        self.name, self.encoder, self.prepare, self.autocast, self.cut = name, encoder, prepare, autocast, cut
        self.draw_key = draw_key

    def __call__(self, inputs: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """`positions`: int64 [M] on the inputs' device, for layers that draw by position; None: they draw from torch's
        generator like any other."""
        weight = next(self.encoder.parameters())
        assert positions is None or len(positions) == len(inputs)
        draws = nullcontext() if positions is None else drawing(self.draw_key, positions)
        with self.shared_casts(), draws, self.cut.at(inputs.shape[1]) if self.cut else nullcontext():
            features = self.encoder(self.prepare(inputs, self.autocast or weight.dtype))
        return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)

    def shared_casts(self) -> AbstractContextManager:
        """Within: the weights' copies in autocast's type are made once for all calls, and their graphs share them.

        Gradients gather in the weights' own type, call by call. Calls with gradients come first: a copy that was made
        without has no way back to its weight.
        """
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device


def learns(encoder: nn.Module) -> bool:
    """Whether anything in it does; one in which nothing does has no second pass."""
    return any(parameter.requires_grad for parameter in encoder.parameters())


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """`train.precision` -> the dtype of autocast, or None for none; auto: bf16 on CUDA, else none."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def normalise_pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """[M, 3, S, S] in 0..255, uint8 or float -> (x / 255 - mean) / std in the given dtype, on the pixels' own device.

    Worked out in float32 at least and rounded once, which is what autocast would do to the first product's input. In
    bf16 throughout, the embeddings of ViT-B-32 would move 15 times as far as by this rounding.
    """

    @cache  # made once: a tensor made from Python numbers on a GPU waits for all its work
    def constants(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        mean_C11, std_C11 = (torch.tensor(x, dtype=dtype, device=device)[:, None, None] for x in (mean, std))
        return 255 * std_C11, mean_C11 / std_C11

    def prepare(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale, shift = constants(images.device, torch.promote_types(dtype, torch.float32))
        return (images / scale - shift).to(dtype)

    return prepare


def token_ids(tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Token ids [M, L], of any integer type, as what a text encoder takes: int64."""
    del dtype
    return tokens.long()


def refuse_batchnorm(model: nn.Module, what: str) -> None:
    """UserError where a chunk's second pass would change what the first one has left."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{what} has BatchNorm ({path}): gradient caching runs every chunk twice, which would "
                "change its statistics; choose a tower with LayerNorm (a ViT, a ConvNeXt)"
            )

"""Changes drawn for each position of the run, on the device that trains: flips, colour jitter, grayscale.

    augment = Augment(config.data.augment, seed)
    pixels = augment(images, positions)            # float32 [M, 3, S, S] in 0..255; uint8 where no colours change

What a picture gets is a function of (seed, position) alone: both passes of gradient caching, any chunking, any number
of ranks draw the same.

The semantics are torchvision's, as open_clip's --aug-cfg applies them. Colour jitter hits `color_jitter_prob` of the
pictures: brightness, contrast and saturation by factors in [max(0, 1 - x), 1 + x], hue by a shift in [-x, x] of the
colour circle, the four in an order drawn for each picture. Grayscale comes after. Between the steps values stay floats
in 0..255, where open_clip rounds them to 8 bits.

No loop over pictures, and on a GPU nothing waits for the host. Shapes: M pictures, S side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipscale.config.data import AugmentSettings
from clipscale.counter import fold
from clipscale.counter_torch import draw, uniform

AT_ONCE = 128  # pictures: bounds the memory of what lies between pixels and result, 8 float32 copies of them

_FLIP, _JITTER, _GRAY, _FACTORS, _HUE, _ORDER = 0, 1, 2, slice(3, 6), 6, slice(7, 11)
_DRAWS = 11
_BRIGHTNESS, _CONTRAST = 0, 1  # 2: saturation
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's


class Augment:
    def __init__(self, config: AugmentSettings, seed: int) -> None:
        *self.factors, self.hue = config.color_jitter
        self.flip, self.grayscale = config.flip, config.grayscale
        self.jitter = config.color_jitter_prob if any(config.color_jitter) else 0.0
        self.key = fold(seed, "augment")

    def __call__(self, images: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [M, 3, S, S], int64 [M] on the same device -> `dtype` [M, 3, S, S] in 0..255.

        Flips alone leave uint8, for they make no new values.
        """
        if not (self.flip or self.jitter or self.grayscale):
            return images
        numbers = torch.arange(_DRAWS, device=positions.device)
        draws = uniform(draw(self.key, positions)[:, None], numbers[None])
        if self.flip:
            images = torch.where(_per_picture(draws[:, _FLIP] < self.flip), images.flip(3), images)
        if not (self.jitter or self.grayscale):
            return images
        out = torch.empty_like(images, dtype=dtype)
        for start in range(0, len(images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            out[part] = self._recoloured(images[part].float(), draws[part])
        return out

    def _recoloured(self, x: Tensor, draws: Tensor) -> Tensor:
        if self.jitter:
            factors, shift = self._strengths(draws)
            x = jitter(x, factors, shift, draws[:, _ORDER], with_hue=self.hue > 0)
        if self.grayscale:
            x = torch.where(_per_picture(draws[:, _GRAY] < self.grayscale), gray(x), x)
        return x

    def _strengths(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of brightness, contrast, saturation [M, 3] and shift of the hue [M]; 1 and 0: left alone."""
        chosen = draws[:, _JITTER] < self.jitter
        columns = []
        for strength, u in zip(self.factors, draws[:, _FACTORS].unbind(1), strict=True):
            low, high = max(0.0, 1 - strength), 1 + strength
            columns.append(torch.where(chosen, low + (high - low) * u, 1.0))
        shift = torch.where(chosen, self.hue * (2 * draws[:, _HUE] - 1), 0.0)
        return torch.stack(columns, dim=1).float(), shift.float()


def jitter(x: Tensor, factors_M3: Tensor, shift_M: Tensor, order_M4: Tensor, with_hue: bool = True) -> Tensor:
    """Brightness, contrast, saturation and hue, each picture in the order of its four numbers in `order_M4`.

    Hue is the dear one. So the other three run around it: each at its turn before the hue, or at its turn behind it,
    and with factor 1 (which changes no bit) at the turn that is not its own.
    """
    order_M3, hue_turn_M1 = order_M4[:, :3], order_M4[:, 3:]
    turns_M3 = order_M3.argsort(dim=1)  # which of the three comes first, second, third
    factors_M3 = factors_M3.gather(1, turns_M3)
    if not with_hue:
        return _blends(x, turns_M3, factors_M3)
    early_M3 = order_M3.gather(1, turns_M3) < hue_turn_M1
    x = _blends(x, turns_M3, torch.where(early_M3, factors_M3, 1.0))
    x = torch.where(_per_picture(shift_M != 0), rotate_hue(x, shift_M), x)
    return _blends(x, turns_M3, torch.where(early_M3, 1.0, factors_M3))


def gray(x: Tensor) -> Tensor:
    """Luma [M, 1, S, S] of [M, 3, S, S]."""
    red, green, blue = x.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def rotate_hue(x: Tensor, shift_M: Tensor) -> Tensor:
    """Turn the colour circle by a share of it; value and saturation of HSV stay.

    A channel falls from the largest of the three to the smallest as the hue goes away from the channel's own.
    """
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = top - low
    red, green, blue = (x / spread.where(spread > 0, 1)).unbind(1)
    top_is_red, top_is_green = x[:, 0] == top[:, 0], x[:, 1] == top[:, 0]
    sixths = torch.where(top_is_red, green - blue, torch.where(top_is_green, 2 + blue - red, 4 + red - green))
    sixths = sixths + 6 * shift_M[:, None, None]
    out = []
    for own in (0, 2, 4):  # the sixth of the circle at which this channel is alone on top
        away = ((sixths - own + 3).remainder(6) - 3).abs()
        out.append(top[:, 0] - spread[:, 0] * (away - 1).clamp(0, 1))
    return torch.stack(out, dim=1)


def _blends(x: Tensor, which_M3: Tensor, factors_M3: Tensor) -> Tensor:
    """Three times factor * x + (1 - factor) * (black, the picture's mean luma, or its luma: by `which`), in 0..255."""
    for which, factor in zip(which_M3.unbind(1), factors_M3.unbind(1), strict=True):
        which, factor, luma = _per_picture(which), _per_picture(factor), gray(x)
        other = torch.where(which == _CONTRAST, luma.mean((2, 3), keepdim=True), luma)
        other = torch.where(which == _BRIGHTNESS, 0.0, other)
        x = (factor * x + (1 - factor) * other).clamp(0, 255)
    return x


def _per_picture(x_M: Tensor) -> Tensor:
    return x_M[:, None, None, None]

"""Captions cut at their end: a causal text tower that pools at the end-of-text token never looks beyond it.

    cut = CaptionCut.of(model.text)             # None: this tower needs its full length
    cut.lengths(tokens_NL)                      # [N]: tokens up to the pooled one, that one included
    with cut.at(16):
        model.text(tokens_NL[:, :16])           # the same features, where no length is above 16

Token i of a causal tower depends on tokens 0 to i alone, so that what stands behind the pooled one changes nothing but
the time it takes.

Shapes: N captions, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from open_clip.transformer import TextTransformer
from torch import Tensor, nn


class CaptionCut:
    """How to run open_clip's text transformer at a shorter length."""

    def __init__(self, encoder: TextTransformer) -> None:
        self._encoder = encoder
        self._masks: dict[tuple, Tensor] = {}  # by length, type and device

    @classmethod
    def of(cls, encoder: nn.Module) -> CaptionCut | None:
        """None for a tower that looks at what follows the end of a caption, or of which that is not known.

        CoCa's class token stands at the end, and padding masks are as long as the caption.
        """
        if not isinstance(encoder, TextTransformer) or encoder.attn_mask is None:
            return None
        at_the_end = encoder.pool_type in ("argmax", "eos") and encoder.cls_emb is None and not encoder.use_pad_mask
        return cls(encoder) if at_the_end else None

    def lengths(self, tokens_NL: Tensor) -> Tensor:
        """[N], int64: the pooled token's position + 1."""
        if self._encoder.pool_type == "eos":
            tokens_NL = (tokens_NL == self._encoder.eos_id).int()
        return tokens_NL.argmax(dim=1) + 1

    @contextmanager
    def at(self, length: int) -> Iterator[None]:
        """Within: the encoder takes captions of `length` tokens. (It cuts its table of positions itself.)"""
        full_LL = self._encoder.attn_mask
        if length == len(full_LL):
            yield
            return
        key = length, full_LL.dtype, full_LL.device
        if key not in self._masks:
            self._masks[key] = full_LL[:length, :length].contiguous()
        self._encoder.attn_mask = self._masks[key]
        try:
            yield
        finally:
            self._encoder.attn_mask = full_LL

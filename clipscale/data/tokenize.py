"""Captions -> token ids, by open_clip's tokenizers.

tokenize = build_tokenizer("ViT-B-32", context_length=77)
tokens_NL = tokenize(["a photo of a cat"])             # int64 [1, 77]
"""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch

Tokenize = Callable[[list[str]], torch.Tensor]


def build_tokenizer(model_name: str | None, context_length: int) -> Tokenize:
    """The tokenizer of an open_clip model, or CLIP's BPE where `model_name` is None. list[str] -> int64 [N, L]."""
    if model_name is None:
        return open_clip.SimpleTokenizer(context_length=context_length)
    return open_clip.get_tokenizer(model_name, context_length=context_length)

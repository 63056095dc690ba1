"""Captions to token ids, by open_clip's tokenizers.

    tokenize = build_tokenizer("ViT-B-32", context_length=77)
    tokens_NL = tokenize(["a photo of a cat"])             # int64 [1, 77]

A tokenizer pickles as its name and length, and is built again where it is unpickled: in the loader's process.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import open_clip
import torch

from clipscale.errors import UserError

_CHARACTERS_PER_TOKEN = 32  # no caption worth the name fills its tokens with longer ones
_CACHED_WORDS = 1 << 18


class Tokenize(Protocol):
    name: str  # two of one name give the same tokens

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """-> int64 [N, L]"""


class _WordCache(dict):
    """Keeps the first words it meets, common ones among them; open_clip's own grows as long as the run does."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < _CACHED_WORDS:
            super().__setitem__(word, tokens)


class Tokenizer:
    """One call at a time, since Hugging Face's tokenizers keep their settings in common. Captions are cut far behind
    what `context_length` tokens hold: BPE takes quadratic time over a word, 5 s over one of 16 KB."""

    def __init__(self, model_name: str | None, context_length: int) -> None:
        self.name = model_name or "CLIP"
        self._recipe = (model_name, context_length)
        self._tokenizer = _load(model_name, context_length)
        self._lock, self._longest = threading.Lock(), _CHARACTERS_PER_TOKEN * context_length

    def __call__(self, captions: list[str]) -> torch.Tensor:
        with self._lock:
            return self._tokenizer([caption[: self._longest] for caption in captions])

    def __reduce__(self) -> tuple[Any, ...]:
        return build_tokenizer, self._recipe


def build_tokenizer(model_name: str | None, context_length: int) -> Tokenizer:
    """The tokenizer of an open_clip model, or CLIP's BPE where `model_name` is None.

    Raises:
        UserError: a Hugging Face tokenizer whose package or vocabulary is not there.
    """
    return Tokenizer(model_name, context_length)


def _load(model_name: str | None, context_length: int) -> Any:
    if model_name is None:
        tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    else:
        try:
            tokenizer = open_clip.get_tokenizer(model_name, context_length=context_length)
        except (ImportError, OSError) as error:  # Hugging Face's: the package, or the vocabulary's download
            raise UserError(f"the tokenizer of model.name={model_name!r} cannot be loaded: {error}") from error
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache = _WordCache(tokenizer.cache)
    return tokenizer

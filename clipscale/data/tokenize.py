"""Captions to token ids, those of open_clip's tokenizers.

    tokenize = build_tokenizer("ViT-B-32", context_length=77)
    tokens_NL = tokenize(["a photo of a cat"])             # int64 [1, 77]

CLIP's own BPE takes a shorter way to the same tokens: the ids of a word are looked up, and a caption of printable ASCII
without an ampersand is not searched for what open_clip would mend in it. Any thread may call a tokenizer. It pickles as
its choice, and is built again where it is unpickled: in the loader's process.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import threading
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from clipscale.errors import UserError
from clipscale.upstream.open_clip_files import CLIP_TOKENS, TokenizerChoice, module_of

if TYPE_CHECKING:
    import open_clip  # takes twice as long to import as torch: where a tokenizer of its is built, and nowhere else

_CHARACTERS_PER_TOKEN = 32  # no caption worth the name fills its tokens with longer ones
_CACHED_WORDS = 1 << 18


class Tokenize(Protocol):
    name: str  # two of one name give the same tokens

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """-> int64 [N, L]"""


class Tokenizer:
    """Captions are cut far behind what `context_length` tokens hold: BPE takes quadratic time over a word, 5 s over one
    of 16 KB."""

    def __init__(self, choice: TokenizerChoice, clips_own: bool = False) -> None:
        """`clips_own`: what is chosen is known to be CLIP's own, and needs no more of open_clip than one file."""
        self.name, self._choice = choice.name, choice
        self._longest = _CHARACTERS_PER_TOKEN * choice.context_length
        theirs = module_of("tokenizer")
        tokenizer = _load_clips_own(theirs) if clips_own else _load(choice)
        simple = isinstance(tokenizer, theirs.SimpleTokenizer) and tokenizer.reduction_fn is None
        self._encode = _Bpe(tokenizer, choice.context_length) if simple else _OneAtATime(tokenizer)
        self._clips_own = simple and self._encode.lower and tokenizer.vocab_size == CLIP_TOKENS

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """-> int64 [N, L]"""
        return self._encode([caption[: self._longest] for caption in captions])

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._choice, self._clips_own)


def caption_hashes(tokens_NL: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the same for the same tokens. A dot product with odd 64-bit constants, modulo 2^64."""
    weights = np.random.default_rng(0).integers(0, 2**63, tokens_NL.shape[1], np.int64) * 2 + 1
    return tokens_NL.long() @ torch.from_numpy(weights)


def build_tokenizer(model_name: str | None, context_length: int) -> Tokenizer:
    """The tokenizer of an open_clip model, or CLIP's BPE where `model_name` is None.

    Raises:
        UserError: a Hugging Face tokenizer whose package or vocabulary is not there.
    """
    return Tokenizer(TokenizerChoice(context_length, model=model_name))


@cache
def _load_clips_own(theirs: ModuleType) -> Any:
    """One for all lengths, which are `_Bpe`'s: it takes a fifth of a second. Of open_clip's file by itself, and of the
    module of the whole, the classes are two."""
    return theirs.SimpleTokenizer()


def _load(choice: TokenizerChoice) -> Any:
    if choice.model is None and choice.hugging_face is None:
        return _load_clips_own(module_of("tokenizer"))
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    length = choice.context_length
    setting = "model.text.hf_tokenizer_name" if choice.hugging_face else "model.name"
    try:
        if choice.model is not None:
            return open_clip.get_tokenizer(choice.model, context_length=length)
        return HFTokenizer(choice.hugging_face, length, tokenizer_mode=choice.mode, **choice.options)
    except (ImportError, OSError, ValueError, TypeError) as error:  # the package, the download, or what is in it
        name = choice.hugging_face or choice.model
        why = " ".join(str(error).split())
        raise UserError(f"the tokenizer of {setting}={name!r} cannot be loaded: {why}") from error


class _OneAtATime:
    """Hugging Face's tokenizers keep the settings of a call in common."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def __call__(self, captions: list[str]) -> torch.Tensor:
        with self._lock:
            return self._tokenizer(captions)


class _Bpe:
    """open_clip's SimpleTokenizer, its words and cleaning, with the ids of words kept."""

    def __init__(self, tokenizer: open_clip.SimpleTokenizer, context_length: int) -> None:
        self._words, self._find = _Words(tokenizer), tokenizer.pat.findall
        self._clean, self._length = tokenizer.clean_fn, context_length
        self.lower = tokenizer.clean_fn is module_of("tokenizer").get_clean_fn("lower")
        self._first, self._last = tokenizer.sot_token_id, tokenizer.eot_token_id

    def __call__(self, captions: list[str]) -> torch.Tensor:
        tokens_NL = np.zeros((len(captions), self._length), np.int64)
        for row, caption in enumerate(captions):
            ids = self._ids(caption)
            tokens_NL[row, : len(ids)] = ids
        return torch.from_numpy(tokens_NL)

    def _ids(self, caption: str) -> list[int]:
        """At most L ids; the last one ends the text, also where it had to be cut."""
        sound = self.lower and caption.isascii() and caption.isprintable() and "&" not in caption
        ids = [self._first]
        for word in self._find(" ".join(caption.split()).lower() if sound else self._clean(caption)):
            ids += self._words[word]
            if len(ids) >= self._length:
                break
        return [*ids[: self._length - 1], self._last]


class _Words(dict[str, list[int]]):
    """Word -> ids. Keeps the first words it meets, common ones among them, however long the run."""

    def __init__(self, tokenizer: open_clip.SimpleTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        tokenizer.cache = _Fixed(tokenizer.cache)

    def __missing__(self, word: str) -> list[int]:
        tokenizer = self._tokenizer
        symbols = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
        ids = [tokenizer.encoder[piece] for piece in tokenizer.bpe(symbols).split(" ")]
        if len(self) < _CACHED_WORDS:
            self[word] = ids
        return ids


class _Fixed(dict[str, str]):
    """In place of open_clip's cache, which grows as long as the run does: what it holds to begin with is needed."""

    def __setitem__(self, word: str, pieces: str) -> None:
        pass

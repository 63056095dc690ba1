"""The tokenizer of a text tower, tried on that tower before anything is trained or evaluated.

    tokenize = fitting_tokenizer(towers)             # of towers.tokenizer
    towers.text(tokenize(["a photo of a cat"]))

A tokenizer of another vocabulary than the tower's gives ids without a meaning there, and mostly without an error.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import string

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from clipscale.data.tokenize import Tokenizer
from clipscale.errors import UserError, require
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import TokenizerChoice

_TRIED = ["", "a photo of a cat", string.printable, "two dogs, one long walk " * 100]


def fitting_tokenizer(towers: Towers) -> Tokenizer:
    """Raises UserError for one that cannot be loaded, or whose ids, length or ends are not what the tower takes."""
    choice = towers.tokenizer
    tokenize = Tokenizer(choice)
    try:
        tokens_NL = tokenize(_TRIED)
    except Exception as error:  # whatever a tokenizer of others does not take
        why = " ".join(str(error).split())
        raise UserError(f"{_named(choice)} does not take captions: {type(error).__name__}: {why}") from error
    _check_ids(choice, tokens_NL, towers.vocabulary)
    _check_ends(choice, tokens_NL, towers)
    training = towers.model.training
    towers.model.eval()
    with torch.no_grad():
        sound = towers.text(tokens_NL.to(towers.text.device)).isfinite().all()
    towers.model.train(training)
    require(bool(sound), f"{_named(choice)}: the text tower makes no finite embedding of its tokens")
    return tokenize


def _check_ids(choice: TokenizerChoice, tokens_NL: Tensor, vocabulary: int) -> None:
    shape = (len(_TRIED), choice.context_length)
    require(
        tokens_NL.shape == shape,
        f"{_named(choice)} makes {list(tokens_NL.shape)} tokens of {shape[0]} captions, the text tower takes "
        f"{list(shape)}; mend model.text.context_length",
    )
    low, high = tokens_NL.min().item(), tokens_NL.max().item()
    require(
        low >= 0 and high < vocabulary,
        f"{_named(choice)} gives ids from {low} to {high}, the text tower knows 0 to {vocabulary - 1}: they are not of "
        "one vocabulary; set model.text.hf_tokenizer_name to that of the text tower, or model.text.vocab_size to that "
        "of the tokenizer",
    )


def _check_ends(choice: TokenizerChoice, tokens_NL: Tensor, towers: Towers) -> None:
    """open_clip's own text tower finds the end of a text by its id: it must be there, and be the same in all."""
    encoder = towers.text.encoder
    if not isinstance(encoder, TextTransformer) or encoder.cls_emb is not None:
        return
    pooling, end_id = encoder.pool_type, encoder.eos_id
    if pooling == "argmax":
        ends = tokens_NL.amax(1).unique().tolist()
        require(
            len(ends) == 1,
            f"{_named(choice)}: model.text.pool_type=argmax takes the highest id for the end of a text, here "
            f"{ends[0]} in one and {ends[-1]} in another; use pool_type=last, or eos with its eos_id",
        )
    if pooling == "eos":
        require(
            bool((tokens_NL == end_id).any(1).all()),
            f"{_named(choice)} ends no text with model.text.eos_id={end_id}; set it to its end-of-text id",
        )


def _named(choice: TokenizerChoice) -> str:
    return f"the tokenizer {choice.name!r}" if choice.model is None else f"the tokenizer of model.name={choice.model!r}"

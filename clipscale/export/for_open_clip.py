"""open_clip's folder: `open_clip_config.json`, the weights as safetensors, and the tokenizer where it is not CLIP's.

write(towers, config.model, Path("exported"))     # open_clip.create_model("local-dir:exported")

A text tower of the usual kind is written in the plain CLIP layout (names without `text.`), which every one of
open_clip's calls opens; others keep their towers apart (`custom_text`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from clipscale.config import Model
from clipscale.errors import UserError, reason
from clipscale.files import write_file
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import model_fields
from clipscale.weights.find import CONFIG, WEIGHTS

_PLAIN = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


def write(towers: Towers, model: Model, folder: Path) -> list[str]:
    """Fill `folder`; what to tell of it."""
    fields, state = model_fields(model), towers.model.state_dict()
    if (plain := _plain_layout(fields["text_cfg"], state)) is not None:
        state = plain
    else:
        fields["custom_text"] = True
    notes = []
    text = fields["text_cfg"]
    if text.get("hf_tokenizer_name"):
        length = towers.context_length
        options = {"tokenizer_mode": text.get("tokenizer_mode"), **(text.get("tokenizer_kwargs") or {})}
        HFTokenizer(text["hf_tokenizer_name"], length, **options).save_pretrained(str(folder))
    if text.get("hf_model_name"):
        notes.append(
            f"The shape of its text tower is read from {text['hf_model_name']}, which must be there to open it."
        )
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    content = {"model_cfg": fields, "preprocess_cfg": dataclasses.asdict(towers.preprocess)}
    write_file(folder / CONFIG, json.dumps(content, indent=2) + "\n")
    return notes


def embed(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The folder opened by open_clip: (pixels, tokens) -> both embeddings.

    Raises:
        UserError: it cannot be.
    """
    try:
        model = open_clip.create_model(f"local-dir:{folder}").eval()
    except Exception as error:  # whatever of a model open_clip does not build the way it was trained
        raise UserError(
            f"open_clip does not open what was written: {reason(error)}; a backbone of timm's opens at "
            "its own size only"
        ) from error
    return lambda pixels, tokens: (
        model.encode_image(pixels, normalize=True),
        model.encode_text(tokens, normalize=True),
    )


def _plain_layout(text: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The state under the names of towers in one; None where open_clip's class of that kind lacks a part."""
    names = {name: name.removeprefix("text.") for name in state}
    its = [short for name, short in names.items() if name.startswith("text.")]
    usual = "text_projection" in its and all(name.startswith(_PLAIN) for name in its)
    if not usual or text.get("hf_model_name") or text.get("output_tokens"):
        return None
    return {names[name]: tensor for name, tensor in state.items()}

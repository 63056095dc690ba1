"""Hugging Face's folder: a CLIPModel with its image processor and tokenizer, for open_clip's usual ViT and text tower.

write(towers, config.model, Path("exported"))     # CLIPModel.from_pretrained("exported")

The weights are the same numbers under other names, and give the same embeddings of the same pixels and ids. Its
processor resizes pictures in another way and its tokenizer cleans captions in another way: card.py says how much, and
has the lines that are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)
from transformers.utils.logging import disable_progress_bar

from clipscale.config import Model
from clipscale.export.common import refused
from clipscale.export.differences import measure
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import CLIP_TOKENS, model_fields, module_of

_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_FIRST, _LAST = "<|startoftext|>", "<|endoftext|>"
_LAYER = {  # of a block, there -> here
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write(towers: Towers, model: Model, folder: Path) -> list[str]:
    """Fill `folder`.

    Raises:
        UserError: a model with parts that CLIPModel has not.
    """
    fields = model_fields(model)
    vision = _usual(CLIPVisionCfg(**fields["vision_cfg"]), _VISION, "vision")
    text = _usual(CLIPTextCfg(**fields["text_cfg"]), _TEXT, "text")
    if text.vocab_size != CLIP_TOKENS:
        raise refused("transformers", f"its vocabulary has {text.vocab_size} tokens, CLIP's {CLIP_TOKENS}")
    processor = CLIPProcessor(_image_processor(towers), _tokenizer(towers.context_length))
    config = _config(towers, vision, text, fields)
    theirs = CLIPModel(config)
    state = towers.model.state_dict()
    moved = _moved(state, vision.layers, text.layers)
    theirs.load_state_dict(moved, strict=False)
    left = [name for name, _ in theirs.named_parameters() if name not in moved]
    assert not left, left
    disable_progress_bar()
    theirs.save_pretrained(folder)
    processor.save_pretrained(folder)
    differences = measure(processor, towers.image_size, towers.context_length, towers.preprocess)
    return [f"transformers' own processor beside it is near, not equal: {differences}"]


def embed(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The folder opened by transformers: (pixels, tokens) -> both embeddings."""
    model = CLIPModel.from_pretrained(folder).eval()

    def run(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        result = model(pixel_values=pixels, input_ids=tokens)
        return result.image_embeds, result.text_embeds

    return run


def _usual(found: Any, known: set[str], what: str) -> Any:
    """Raises UserError for a field that is not as usual and that CLIPModel has no counterpart of."""
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name not in known and value != field.default and value not in (None, {}):
            raise refused("transformers", f"model.{what}.{field.name}={value!r} has no counterpart in its CLIPModel")
    if not isinstance(found.layers, int):
        raise refused("transformers", f"model.{what}.layers={found.layers} is a ResNet")
    return found


def _config(towers: Towers, vision: CLIPVisionCfg, text: CLIPTextCfg, fields: dict[str, Any]) -> CLIPConfig:
    both = {"hidden_act": "quick_gelu" if fields["quick_gelu"] else "gelu", "projection_dim": towers.embed_dim}
    vision_config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=int(vision.width * vision.mlp_ratio),
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.width // vision.head_width,
        image_size=towers.image_size,
        patch_size=vision.patch_size,
        **both,
    )
    text_config = CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=towers.context_length,
        bos_token_id=CLIP_TOKENS - 2,
        eos_token_id=CLIP_TOKENS - 1,  # 2, the default of old, means something else
        pad_token_id=CLIP_TOKENS - 1,
        **both,
    )
    return CLIPConfig(
        text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), projection_dim=towers.embed_dim
    )


def _moved(state: dict[str, Tensor], vision_layers: int, text_layers: int) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    moved = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text.text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["text.positional_embedding"],
    }
    pairs = [
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "text.ln_final"),
    ]
    for theirs, ours, layers in (("vision_model", "visual", vision_layers), ("text_model", "text", text_layers)):
        for i in range(layers):
            there, here = f"{theirs}.encoder.layers.{i}", f"{ours}.transformer.resblocks.{i}"
            pairs += [(f"{there}.{name}", f"{here}.{its}") for name, its in _LAYER.items()]
            for kind in ("weight", "bias"):
                parts = state[f"{here}.attn.in_proj_{kind}"].chunk(3)
                names = (f"{there}.self_attn.{each}_proj.{kind}" for each in "qkv")
                moved |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return moved | {f"{name}.{kind}": state[f"{its}.{kind}"] for name, its in pairs for kind in ("weight", "bias")}


def _image_processor(towers: Towers) -> CLIPImageProcessor:
    preprocess, side = towers.preprocess, towers.image_size
    for name, usual in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if (value := getattr(preprocess, name)) != usual:
            raise refused("transformers", f"model.preprocess.{name}={value} is not its CLIP processor's")
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def _tokenizer(context_length: int) -> CLIPTokenizer:
    """CLIP's own, with the names that transformers has for the first and the last token: under open_clip's names they
    would be added behind the vocabulary, out of the text tower's range."""
    theirs = module_of("tokenizer").SimpleTokenizer()
    vocabulary = dict(theirs.encoder)
    for id, name in ((theirs.sot_token_id, _FIRST), (theirs.eot_token_id, _LAST)):
        del vocabulary[theirs.decoder[id]]
        vocabulary[name] = id
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks), model_max_length=context_length)
    assert len(tokenizer) == CLIP_TOKENS
    return tokenizer

"""What a tower costs, by closed formulas, from the fields that describe it: parameters, operations, memory of a graph.

    image, text = plain_towers(config.model, config.towers, half=True)   # None for a tower that no formula knows
    image.parameters, image.forward_flop()                  # 87,849,216 and 8.7e9
    image.graph_bytes(samples=256, tokens=256 * image.tokens)

A plain tower is open_clip's VisionTransformer or TextTransformer with nothing but the common fields: any ViT of
open_clip's, any of a config's that has no timm_model_name, hf_model_name, layer scale, pooler or block of another kind.
Bytes are of the tensors that autograd saves of fused attention (flash, memory-efficient), as step/costs.py counts them.

Shapes: T tokens of a sample, W width, F width of the MLP, H heads, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipscale.config import Model, TowerSettings
from clipscale.upstream.open_clip_files import model_fields

_ANY = object()
_VISION = {  # open_clip's fields of a plain tower, and what they may be; what is not set or falsy is always plain
    **dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"), _ANY),
    **dict.fromkeys(("no_ln_pre", "final_ln_after_pool", "act_kwargs", "norm_kwargs"), _ANY),
    "pool_type": ("tok", "avg"),
    "pos_embed_type": ("learnable",),
    "block_type": ("default",),
}
_TEXT = {
    **dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask"), _ANY),
    **dict.fromkeys(("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id"), _ANY),
    **dict.fromkeys(("proj_bias", "final_ln_after_pool", "act_kwargs", "norm_kwargs", "hf_model_pretrained"), _ANY),
    **dict.fromkeys(("hf_proj_type", "hf_pooler_type"), _ANY),
    "pool_type": ("argmax", "eos", "first", "last"),
    "proj_type": ("linear", "none"),
    "block_type": ("default",),
}
_VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}


@dataclass(frozen=True)
class TowerFacts:
    """Of one tower. `flop` and bytes are of one sample, in training."""

    name: str
    parameters: int
    cast: int
    """Those of which autocast makes a copy in half precision."""
    tokens: int
    """T of a picture, or of a caption of full length. 1 of a picture whose tower was built: all is by sample then."""
    cuttable: bool
    """Captions may be cut at their end, so that T is theirs."""
    flop: tuple[float, float, float]
    """Of a forward pass: by sample, by token, by token squared. A multiplication and an addition are two."""
    graph_sample: float
    graph_token: float
    """Bytes that autograd saves."""
    replay_token: float
    """Bytes beside them at the peak of the backward pass."""
    formula: bool = True

    def forward_flop(self, tokens: float | None = None) -> float:
        """Of a sample of `tokens`, by default all of them."""
        length = self.tokens if tokens is None else tokens
        of_sample, of_token, of_square = self.flop
        return of_sample + of_token * length + of_square * length * length

    def graph_bytes(self, samples: float, tokens: float) -> float:
        """Of a chunk of `samples` that hold `tokens` in all."""
        return self.graph_sample * samples + self.graph_token * tokens


@dataclass(frozen=True)
class _Numbers:
    """Bytes of a number: of products, of the residual stream, and as a norm keeps its input."""

    product: int
    stream: int
    norm: int
    checkpointed: bool

    @classmethod
    def of(cls, settings: TowerSettings, *, half: bool, in_halves: bool) -> _Numbers:
        """`in_halves`: under autocast the stream is in half precision."""
        stream = 2 if half and in_halves else 4
        norm = stream if settings.fast_norms else 4
        return cls(2 if half else 4, stream, norm, settings.checkpoint_blocks)


@dataclass(frozen=True)
class _Blocks:
    """A stack of transformer blocks."""

    layers: int
    width: int
    hidden: int
    heads: int
    quick_gelu: bool

    @property
    def parameters(self) -> int:
        width, hidden = self.width, self.hidden
        norms, attention, mlp = 4 * width, 4 * (width * width + width), 2 * width * hidden + hidden + width
        return self.layers * (norms + attention + mlp)

    @property
    def flop(self) -> tuple[float, float]:
        """By token, by token squared: the products with weights, and attention's two."""
        return self.layers * 2 * (4 * self.width**2 + 2 * self.width * self.hidden), self.layers * 4 * self.width

    def graph_token(self, numbers: _Numbers) -> int:
        """Of each block, or where they are checkpointed its input alone."""
        return self.layers * (self.width * numbers.stream if numbers.checkpointed else self._block_token(numbers))

    def _block_token(self, numbers: _Numbers) -> int:
        """Two norms' inputs with their mean and deviation; the norms' outputs, q, k, v, what attention gives and its
        logsumexp; around the activation."""
        activation = 3 if self.quick_gelu else 2
        of_norms, size = 2 * numbers.norm, numbers.product
        return self.width * (of_norms + 6 * size) + self.hidden * size * activation + 16 + 4 * self.heads

    def replay_token(self, numbers: _Numbers) -> int:
        """The residual's gradient, its copy in half precision, and the MLP's; a checkpointed block, run again."""
        size, stream = numbers.product, numbers.stream
        transient = self.width * (stream + size * (stream != size)) + self.hidden * size
        return transient + (self._block_token(numbers) if numbers.checkpointed else 0)


def plain_towers(model: Model, settings: TowerSettings, *, half: bool) -> tuple[TowerFacts | None, TowerFacts | None]:
    """Image and text tower of a model that `check_model` lets pass; None: no formula knows it.

    Args:
        settings: how the towers are computed.
        half: products in bf16 or fp16 under autocast, else in float32.
    """
    fields = model_fields(model)
    vision, text = fields["vision_cfg"], fields["text_cfg"]
    width, quick = fields["embed_dim"], bool(fields["quick_gelu"])
    pictures = _Numbers.of(settings, half=half, in_halves=True)  # their first norm rounds
    captions = _Numbers.of(settings, half=half, in_halves=settings.residual == "bf16")
    return (
        _image(_VISION_DEFAULTS | vision, width, quick, pictures) if _plain(vision, _VISION) else None,
        _text(_TEXT_DEFAULTS | text, width, quick, captions) if _plain(text, _TEXT) else None,
    )


def _plain(fields: dict[str, Any], known: dict[str, Any]) -> bool:
    whole = all(isinstance(fields.get(name, 0), int) for name in ("layers", "patch_size", "image_size"))
    return whole and all(
        not value or (key in known and (known[key] is _ANY or value in known[key])) for key, value in fields.items()
    )


def _image(fields: dict[str, Any], embed_dim: int, quick: bool, numbers: _Numbers) -> TowerFacts:
    width, side, patch = fields["width"], fields["image_size"], fields["patch_size"]
    grid = (side // patch) ** 2
    hidden, heads = int(width * fields["mlp_ratio"]), width // fields["head_width"]
    blocks = _Blocks(fields["layers"], width, hidden, heads, quick)
    pre, after_pool = not fields.get("no_ln_pre"), bool(fields.get("final_ln_after_pool"))
    dropped = fields.get("patch_dropout") or 0.0
    tokens = 1 + (max(1, int(grid * (1 - dropped))) if dropped else grid)
    size, norm = numbers.product, numbers.norm
    graph_token, graph_sample = blocks.graph_token(numbers) + pre * (norm * width + 8), 3 * side * side * size
    graph_sample += 4 * embed_dim + 8
    average = fields.get("pool_type") == "avg"
    if not after_pool:
        graph_token += norm * width + 8 + (0 if average else size * width)  # a picture's one token is a view of all
        graph_sample += size * width if average else 0
    else:
        graph_token += 0 if average or size == 2 else 4 * width
        graph_sample += norm * width + 8 + size * width
    by_token, by_square = blocks.flop
    products = 3 * patch * patch * width
    return TowerFacts(
        name="image",
        parameters=products
        + width
        + (grid + 1) * width
        + 2 * width * (1 + pre)
        + blocks.parameters
        + width * embed_dim,
        cast=products + blocks.parameters + width * embed_dim,
        tokens=tokens,
        cuttable=False,
        flop=(2.0 * (products * grid + width * embed_dim), by_token, by_square),
        graph_sample=graph_sample,
        graph_token=graph_token,
        replay_token=blocks.replay_token(numbers),
    )


def _text(fields: dict[str, Any], embed_dim: int, quick: bool, numbers: _Numbers) -> TowerFacts:
    width, length, vocabulary = fields["width"], fields["context_length"], fields["vocab_size"]
    blocks = _Blocks(fields["layers"], width, int(width * fields["mlp_ratio"]), fields["heads"], quick)
    projects = fields.get("proj_type", "linear") != "none"
    projection = projects * (width * embed_dim + bool(fields.get("proj_bias")) * embed_dim)
    at_end = fields.get("pool_type", "argmax") in ("argmax", "eos")
    size = numbers.product
    by_token, by_square = blocks.flop
    return TowerFacts(
        name="text",
        parameters=vocabulary * width + length * width + blocks.parameters + 2 * width + projection,
        cast=blocks.parameters + projection,
        tokens=length,
        cuttable=at_end and not fields.get("no_causal_mask"),
        flop=(2.0 * projects * width * embed_dim, by_token, by_square),
        graph_sample=4 * embed_dim + 8 + size * width + 16 * at_end,
        graph_token=blocks.graph_token(numbers) + numbers.norm * width + 8 + (0 if at_end or size == 2 else 4 * width),
        replay_token=blocks.replay_token(numbers),
    )

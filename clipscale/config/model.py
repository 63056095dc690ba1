"""The settings of `model`: which towers, their pixels, and the weights that they begin with. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from clipscale.errors import require
from clipscale.paths import WeightsPath


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes what the image tower takes: open_clip's preprocess_cfg, by default that of most models."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # taken off red, green, blue (0 to 1)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # by which they are then divided
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"  # evaluation: the side that becomes S, or both
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of evaluation's resize
    fill_color: int = 0  # beside a picture whose longest side became S: this grey, 0 to 255

    def __post_init__(self) -> None:
        require(all(std > 0 for std in self.std), f"model.preprocess.std={list(self.std)} must be above 0")
        require(
            0 <= self.fill_color <= 255, f"model.preprocess.fill_color={self.fill_color} must lie between 0 and 255"
        )


@dataclass(frozen=True)
class Model:
    """An open_clip model by its name, or one of one's own by `vision` and `text`: either, not both."""

    name: str | None = None  # such as ViT-B-32
    embed_dim: int = 512  # D; used only with vision/text below, a named model brings its own
    vision: dict[str, Any] | None = None  # fields of open_clip's CLIPVisionCfg
    text: dict[str, Any] | None = None  # fields of open_clip's CLIPTextCfg
    quick_gelu: bool = False  # x * sigmoid(1.702 x) as the activation, as OpenAI's own models have it
    # What similarities are multiplied by at the start; it is learned. null: the named model's own, else 1 / 0.07.
    logit_scale_init: float | None = None
    logit_scale_max: float = 100.0  # it is held at or below this
    image_size: int | None = None  # pixels of a side, of any model; null: the model's own
    context_length: int | None = None  # tokens of a caption, of any model; null: the model's own
    # Weights to begin with: a run, a checkpoint, an exported folder, a file of open_clip's or timm's, or one of
    # open_clip's tags for model.name. A run that resumes has its own.
    init: WeightsPath | None = None
    init_ema: bool = False  # of a run or checkpoint: the average of its weights (ema)
    init_towers: Literal["both", "image", "text"] = "both"  # what is taken of them; both: the logit scale too
    init_strict: bool = True  # what has no counterpart of its shape is an error; false: it is told, and stays fresh
    init_context: Literal["stretch", "cut"] = "stretch"  # the text's positions where lengths differ; or the first ones
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        require(
            bool(self.vision) == bool(self.text),
            "model.vision and model.text must be given together (or neither, to use the open_clip model model.name)",
        )
        require(
            self.name is None or not self.vision,
            f"model.name={self.name!r} asks for an open_clip model, but model.vision and model.text describe another; "
            "set one of them to null (model.vision together with model.text)",
        )
        require(
            self.init is not None or not self.init_ema,
            "model.init_ema=true asks for averaged weights, and model.init names none; set it to a run or checkpoint",
        )
        require(self.embed_dim >= 1, f"model.embed_dim={self.embed_dim} must be at least 1")
        for name in ("image_size", "context_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or null")
        init = self.logit_scale_max if self.logit_scale_init is None else self.logit_scale_init
        require(
            0 < init <= self.logit_scale_max,
            f"model.logit_scale_init={self.logit_scale_init} must lie in (0, model.logit_scale_max="
            f"{self.logit_scale_max}]",
        )

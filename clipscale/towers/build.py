"""Both towers and the logit scale, from an open_clip model name or from fields written out in the YAML.

    towers = build_towers(config.model)
    image_embeddings = towers.image(images_uint8)      # [M, D]
    text_embeddings = towers.text(tokens)              # [M, D]
    towers.logit_scale()                               # s, 1/0.07 at first

The weights live in open_clip's own `CustomTextCLIP` (`towers.model`), so that a checkpoint's state dict loads there.
The towers are separate doors into it, and the logit scale stays outside both.
"""

from __future__ import annotations

import math
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from clipscale.config import Model, Preprocess, TowerSettings
from clipscale.counter import fold
from clipscale.deterministic import naming_who_is_not
from clipscale.errors import UserError, require
from clipscale.towers.blocks import checkpoint_blocks
from clipscale.towers.captions import CaptionCut
from clipscale.towers.compiled import compile_blocks
from clipscale.towers.draws import draw_by_position, draws_by_chunk
from clipscale.towers.fast import how_computed, speed_up
from clipscale.towers.tower import Tower, normalise_pixels, refuse_batchnorm, token_ids
from clipscale.upstream.open_clip_files import TokenizerChoice, check_model, logit_scale_init, model_fields

_DEFAULT = TowerSettings()


@dataclass
class Towers:
    """The trainable whole. `model` owns every parameter, `model.logit_scale` (the logarithm of s) among them."""

    model: open_clip.CustomTextCLIP
    image: Tower
    text: Tower
    embed_dim: int  # D
    image_size: int
    vocabulary: int  # token ids that the text tower knows: 0 to this, exclusively
    tokenizer: TokenizerChoice  # the one whose ids the text tower is for
    logit_scale_max: float
    preprocess: Preprocess  # its mean and std are in `image` already
    settings: TowerSettings  # by which both are computed

    @property
    def context_length(self) -> int:
        """Tokens of a caption, L."""
        return self.tokenizer.context_length

    def logit_scale(self) -> float:
        """s = exp(log scale), the factor of the cosine similarities."""
        return math.exp(self.model.logit_scale.item())

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the logit scale: those whose gradients are summed over the ranks."""
        return [parameter for name, parameter in self.model.named_parameters() if name != "logit_scale"]

    def examples(self) -> tuple[tuple[Tower, torch.Tensor], tuple[Tower, torch.Tensor]]:
        """Each tower with an input: one black picture, one blank caption."""
        side, device = self.image_size, self.image.device
        picture = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        caption = torch.zeros(1, self.context_length, dtype=torch.int64, device=device)
        return (self.image, picture), (self.text, caption)

    def noise(self, tower: Tower, samples: int) -> torch.Tensor:
        """Inputs of one of the two on its device: uint8 [M, 3, S, S], or int64 [M, L] of full length. For timing: zeros
        are cheaper to multiply."""
        if tower is self.image:
            shape = samples, 3, self.image_size, self.image_size
            return torch.randint(256, shape, dtype=torch.uint8, device=tower.device)
        return torch.randint(self.vocabulary, (samples, self.context_length), device=tower.device)

    def draws_by_chunk(self) -> dict[str, list[str]]:
        """Name of the tower -> names of its modules that draw for a chunk as a whole, each in the mode it is in now.

        Empty: what a sample draws depends on its position alone. Patch dropout and drop path of open_clip and timm are
        never named, other dropout always. Costs a forward pass over one sample.
        """
        found = {}
        with torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext():  # hooks want graphs
            for tower, example in self.examples():
                position = torch.zeros(1, dtype=torch.int64, device=tower.device)
                found[tower.name] = draws_by_chunk(tower.encoder, partial(tower, example, position))
        return found

    def how_computed(self) -> str:
        """How each tower is computed in training, of what open_clip does otherwise: a line for a log."""
        parts = []
        for tower in (self.image, self.text):
            words = [how_computed(tower.encoder, tower.autocast or self.model.logit_scale.dtype)]
            words += ["blocks compiled"] if self.settings.compile else []
            words += ["blocks checkpointed"] if self.settings.checkpoint_blocks else []
            parts.append(f"{tower.name}: {', '.join(words)}")
        return "; ".join(parts)

    def clamp_logit_scale(self) -> bool:
        """Keep s <= logit_scale_max, after an optimizer step (Radford et al., arXiv 2103.00020, section 2.5).

        Returns:
            Whether it was above.
        """
        bound = math.log(self.logit_scale_max)
        above = (self.model.logit_scale > bound).item()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=bound)
        return above


def build_towers(
    config: Model,
    settings: TowerSettings = _DEFAULT,
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Towers:
    """Both towers with fresh weights, the same on every rank for the same seed.

    Args:
        settings: how the towers are computed.
        autocast: dtype of the matrix products inside the towers, or None for float32.
        seed: of the weights, and of what the towers draw by position.

    Raises:
        UserError: unknown model name, unknown or impossible fields, a tower with BatchNorm; settings that do not go
            with it.
    """
    require(
        settings.residual == "open_clip" or autocast == torch.bfloat16,
        f"towers.residual={settings.residual} wants the towers in bf16, and on a {torch.device(device).type} "
        "train.precision=auto is another type; set train.precision=bf16, or towers.residual=open_clip",
    )
    check_model(config)
    fields = _fields(config)
    what = "the model of model.vision and model.text" if config.vision else f"model {config.name!r}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.CustomTextCLIP(init_logit_scale=math.log(logit_scale_init(config)), **fields)
            if config.image_size is not None and fields["vision_cfg"].timm_model_name:
                model.visual.set_input_size(config.image_size)  # a backbone of timm's has its own
        except Exception as error:  # open_clip and timm assert, divide, unpack and download
            raise UserError(f"{what} cannot be built: {_reason(error)}") from error
    refuse_batchnorm(model, what)
    for name, encoder in (("image", model.visual), ("text", model.text)):
        draw_by_position(encoder)
        speed_up(encoder, settings)
        if settings.compile:
            compile_blocks(name, encoder)
        if settings.checkpoint_blocks:
            checkpoint_blocks(encoder)
    model = model.to(device)
    side = fields["vision_cfg"].image_size
    side, other = (side, side) if isinstance(side, int) else side
    require(side == other, f"model.vision.image_size={[side, other]} must be square")
    towers = Towers(
        model=model,
        image=Tower(
            "image",
            model.visual,
            normalise_pixels(config.preprocess.mean, config.preprocess.std),
            autocast,
            draw_key=fold(seed, "draws", "image"),
        ),
        text=Tower(
            "text", model.text, token_ids, autocast, CaptionCut.of(model.text), draw_key=fold(seed, "draws", "text")
        ),
        embed_dim=fields["embed_dim"],
        image_size=side,
        vocabulary=_vocabulary(model.text),
        tokenizer=_tokenizer(config, fields["text_cfg"]),
        logit_scale_max=config.logit_scale_max,
        preprocess=config.preprocess,
        settings=settings,
    )
    _try_out(towers, what)
    return towers


def _try_out(towers: Towers, what: str) -> None:
    """One black picture and one blank caption tell whether the fields fit each other, before any data are read."""
    kinds = f"pictures of {towers.image_size} x {towers.image_size}", f"captions of {towers.context_length} tokens"
    training = towers.model.training
    towers.model.eval()
    for (tower, example), kind in zip(towers.examples(), kinds, strict=True):
        try:
            with torch.no_grad():
                shape = tower(example).shape[1:]
        except Exception as error:  # whatever comes of fields that do not fit
            raise UserError(f"{what} does not take {kind}: {_reason(error)}") from error
        require(
            shape == (towers.embed_dim,),
            f"{what} makes {list(shape)} numbers of each of its {kind}, not the embed_dim={towers.embed_dim} of both "
            "towers; mend its pooling and projection",
        )
    towers.model.train(training)


def try_backward(towers: Towers) -> None:
    """The same pass of each tower as in training, forth and back; nothing of it stays.

    Raises:
        SharedError: under train.deterministic, an operation that is not repeatable.
    """
    model, device = towers.model, towers.image.device
    training = model.training
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for tower, example in towers.examples():
            with naming_who_is_not(f"the {tower.name} tower"):
                embeddings = tower(example)
                if embeddings.requires_grad:
                    embeddings.sum().backward()
    model.zero_grad(set_to_none=True)
    model.train(training)


def _reason(error: Exception) -> str:
    """The error in one line; of an assertion without words, the assertion itself."""
    words = str(error).splitlines()[:1] or [traceback.extract_tb(error.__traceback__)[-1].line]
    return f"{type(error).__name__}: {words[0]}"


def _fields(config: Model) -> dict:
    """What CustomTextCLIP takes."""
    fields = model_fields(config)
    return fields | {
        "vision_cfg": CLIPVisionCfg(**fields["vision_cfg"]),
        "text_cfg": CLIPTextCfg(**fields["text_cfg"]),
    }


def _tokenizer(config: Model, text: CLIPTextCfg) -> TokenizerChoice:
    """Name and length are what open_clip's configuration of the text tower says, not what the tower could take."""
    if config.vision is None:
        return TokenizerChoice(text.context_length, model=config.name)
    return TokenizerChoice(
        text.context_length,
        hugging_face=text.hf_tokenizer_name,
        mode=text.tokenizer_mode,
        options=dict(text.tokenizer_kwargs or {}),
    )


def _vocabulary(text: nn.Module) -> int:
    """How many token ids the tower has an embedding for."""
    if isinstance(text, HFTextEncoder):
        return text.transformer.get_input_embeddings().num_embeddings
    return text.token_embedding.num_embeddings

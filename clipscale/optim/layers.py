"""The layers of a tower, from its input up: embeddings, each block (the last with the norm behind it), projection.

    layers_of(model.visual)     # {'conv1.weight': 0, ..., 'transformer.resblocks.0.ln_1.weight': 1, ..., 'proj': 13}

They are those by which open_clip unlocks a tower, and those that timm's models name (`group_matcher`).
"""

from __future__ import annotations

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

_WITH_THE_ONE_BEFORE = (99999,)  # timm's word for it
_OPEN_CLIP = {
    "stem": r"^(?:conv1|class_embedding|positional_embedding|ln_pre|token_embedding|cls_emb)",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^(?:ln_post|ln_final)", _WITH_THE_ONE_BEFORE)],
}
_HUGGING_FACE = {  # the first number in a name is its block's; a norm behind the last has none, and no embedding's word
    "stem": r"^transformer\.(?:[a-z_]+\.)*(?:\w*embed\w*|shared)\.",
    "blocks": [(r"^transformer\.\D+\.(\d+)\.", None), (r"^transformer\.", _WITH_THE_ONE_BEFORE)],
}
_PROJECTIONS = ("proj", "text_projection", "head.")  # open_clip's; a timm backbone may have its classifier as one


def layers_of(encoder: nn.Module) -> dict[str, int]:
    """The layer of each of the encoder's parameters, by its name in the encoder; 0 is the lowest."""
    if not isinstance(encoder, TimmModel):
        matcher = _HUGGING_FACE if isinstance(encoder, HFTextEncoder) else _OPEN_CLIP
        return group_parameters(encoder, matcher, reverse=True)
    trunk = group_parameters(encoder.trunk, encoder.trunk.group_matcher(coarse=False), reverse=True)
    head = max(trunk.values()) + 1
    return {f"trunk.{name}": layer for name, layer in trunk.items()} | {
        f"head.{name}": head for name, _ in encoder.head.named_parameters()
    }


def head_of(encoder: nn.Module) -> set[str]:
    """Names of the parameters that project the features into the embedding space; none where nothing does."""
    classifier = encoder.trunk.default_cfg.get("classifier") or () if isinstance(encoder, TimmModel) else ()
    classifiers = (classifier,) if isinstance(classifier, str) else classifier
    heads = (*_PROJECTIONS, *(f"trunk.{name}." for name in classifiers))
    return {name for name, _ in encoder.named_parameters() if name.startswith(heads)}

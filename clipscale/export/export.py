"""A model as a folder that open_clip, transformers or onnxruntime opens, checked before it gets its name.

    lines = export_model(found, config, "open_clip", "exported/b32")

The folder is written aside, opened by the library it is for, its embeddings compared with those of the towers, and only
then renamed: one that is there opens.
"""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipscale.config import Config
from clipscale.errors import require
from clipscale.export.card import write_card
from clipscale.export.check import Format, check_export
from clipscale.files import sync_folder
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.towers import Towers
from clipscale.weights.find import Found
from clipscale.weights.target import open_towers

Embed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # pixels [M, 3, S, S], tokens [M, L] -> both embeddings
TOLERANCE = 1e-5  # of a component of an embedding of length 1


def export_model(found: Found, config: Config, kind: Format, output: str) -> list[str]:
    """Write the folder `output`; what to tell of it, in lines.

    Raises:
        UserError: a model that this format cannot hold, or what was written gives other embeddings.
    """
    check_export(kind, output)
    towers = open_towers(found, config.model)
    towers.model.eval()
    form = importlib.import_module(f"clipscale.export.for_{kind}")
    target = Path(output)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir(parents=True)
        notes = form.write(towers, config.model, aside)
        difference = _difference(towers, form.embed(aside), kind)
        write_card(aside, kind, found, config, towers, difference, notes)
        for path in aside.iterdir():  # safetensors keeps its files to this user
            path.chmod((aside / "README.md").stat().st_mode)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.absolute().parent)
    return [f"{output}: {found.words} for {kind}; embeddings differ by {difference:.1e} at most", *notes]


@torch.no_grad()
def _difference(towers: Towers, embed: Embed, kind: Format) -> float:
    """The largest one between what the folder makes of a few inputs and what the towers make."""
    differences = []
    for samples in (1, 2, 5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(samples)
            images, tokens = towers.noise(towers.image, samples), _captions(towers, samples)
        wanted = towers.image(images), towers.text(tokens)
        found = embed(towers.image.prepare(images, torch.float32), tokens)
        differences += [(mine - theirs).abs().max() for mine, theirs in zip(wanted, found, strict=True)]
    worst = torch.stack(differences).max().item()  # NaN if any is
    require(
        worst <= TOLERANCE,
        f"{kind} makes other embeddings of what was written: they differ by {worst:.1e}; the model has a part that it "
        "computes in another way",
    )
    return worst


def _captions(towers: Towers, samples: int) -> Tensor:
    """Of several lengths, by the tower's own tokenizer."""
    tokenize = fitting_tokenizer(towers)
    return tokenize([" ".join(f"a{n * 7919 % 997} photo" for n in range(row + 1)) for row in range(samples)])

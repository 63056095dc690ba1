"""Two ONNX graphs, one a tower, with their weights beside them and a free number of samples.

    write(towers, config.model, Path("exported"))
    onnxruntime.InferenceSession("exported/image.onnx").run(None, {"pixels": pixels})    # [N, D], of length 1

`image.onnx` takes normalised pixels, float32 [N, 3, S, S]; `text.onnx` token ids, int64 [N, L].
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipscale.config import Model
from clipscale.errors import reason
from clipscale.export.common import refused
from clipscale.towers import Towers

_INPUTS = {"image": "pixels", "text": "tokens"}


class _Embeds(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(inputs), dim=-1)


def write(towers: Towers, model: Model, folder: Path) -> list[str]:
    """Fill `folder`.

    Raises:
        UserError: an operation that ONNX has not.
    """
    del model
    images = towers.image.prepare(towers.noise(towers.image, 2), torch.float32)
    tokens = towers.noise(towers.text, 2)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for tower, example in ((towers.image, images), (towers.text, tokens)):
        try:
            torch.onnx.export(
                _Embeds(tower.encoder).eval(),
                (example,),
                str(folder / f"{tower.name}.onnx"),
                dynamo=True,
                external_data=True,
                input_names=[_INPUTS[tower.name]],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("samples")},),
                verbose=False,
            )
        except Exception as error:  # whatever of a tower cannot be traced
            raise refused("onnx", f"its {tower.name} tower cannot be traced: {reason(error)}") from error
    return []


def embed(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The folder opened by onnxruntime: (pixels, tokens) -> both embeddings."""
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in _INPUTS
    }

    def run(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"image": pixels, "text": tokens}
        image, text = (
            torch.from_numpy(sessions[name].run(None, {_INPUTS[name]: inputs[name].numpy()})[0]) for name in _INPUTS
        )
        return image, text

    return run

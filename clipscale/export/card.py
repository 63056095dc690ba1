"""The README of an exported model: what it is, what it was trained on and how, its scores, and how to open it.

write_card(Path("exported"), "open_clip", found, config, towers, 0.0)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipscale.config import Config, Optim
from clipscale.export.check import Format
from clipscale.files import read_rows, write_file
from clipscale.schedule import schedule_lines
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import model_fields
from clipscale.weights.find import Found

_OPEN = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
image = model.encode_image(preprocess(picture)[None], normalize=True)
text = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
""",
    "transformers": """\
import open_clip  # for pixels and token ids that are exactly those of training
from transformers import CLIPModel

model = CLIPModel.from_pretrained("{folder}").eval()
preprocess = open_clip.image_transform({side}, is_train=False, {pixels})
tokenizer = {tokenizer}
result = model(pixel_values=preprocess(picture)[None], input_ids=tokenizer(["a photo of a cat"]))
result.image_embeds, result.text_embeds
""",
    "onnx": """\
import onnxruntime
import open_clip

preprocess = open_clip.image_transform({side}, is_train=False, {pixels})
tokenizer = {tokenizer}
image = onnxruntime.InferenceSession("{folder}/image.onnx").run(None, {{"pixels": preprocess(picture)[None].numpy()}})
text = onnxruntime.InferenceSession("{folder}/text.onnx").run(None, {{"tokens": tokenizer(["a cat"]).numpy()}})
""",
}
_PROCESSOR = """
`AutoProcessor.from_pretrained` opens the processor that lies beside the weights. It resizes pictures in another way and
does not mend broken or escaped text as open_clip's tokenizer does; the lines above are exact.
"""


def write_card(
    folder: Path,
    kind: Format,
    found: Found,
    config: Config,
    towers: Towers,
    difference: float,
    notes: list[str],
) -> None:
    """README.md in `folder`."""
    preprocess, tokenizer = towers.preprocess, towers.tokenizer
    if tokenizer.model is not None:
        builds = f'open_clip.get_tokenizer("{tokenizer.model}", context_length={tokenizer.context_length})'
    elif tokenizer.hugging_face is not None:
        builds = f'open_clip.tokenizer.HFTokenizer("{tokenizer.hugging_face}", {tokenizer.context_length})'
    else:
        builds = f"open_clip.SimpleTokenizer(context_length={tokenizer.context_length})"
    code = _OPEN[kind].format(
        folder="<this folder>",
        side=towers.image_size,
        tokenizer=builds,
        pixels=f"mean={preprocess.mean}, std={preprocess.std}, resize_mode={preprocess.resize_mode!r}, "
        f"interpolation={preprocess.interpolation!r}, fill_color={preprocess.fill_color}",
    )
    parts = [
        f"---\nlibrary_name: {kind}\npipeline_tag: zero-shot-image-classification\n---",
        f"# {config.model.name or 'A CLIP model'}",
        f"Exported by clipscale from a {found.kind}. What this folder holds makes the embeddings of the towers it was "
        f"exported from, to {difference:.0e}.",
        f"```python\n{code}```",
    ]
    parts += notes
    if kind == "transformers":
        parts.append(_PROCESSOR.strip())
    parts.append("## Model\n\n" + _table(_model(config, towers)))
    if found.kind == "checkpoint":
        state = json.loads((found.path / "state.json").read_text())
        parts.append("## Training\n\n" + _table(_training(config, state)))
        scores = _scores(found.path, state["step"])
        parts.append("## Scores\n\n" + (_table(scores) if scores else "None were taken."))
    write_file(folder / "README.md", "\n\n".join(parts) + "\n")


def _model(config: Config, towers: Towers) -> dict[str, Any]:
    return {
        "pictures": f"{towers.image_size} x {towers.image_size}",
        "captions": f"{towers.context_length} tokens of {towers.tokenizer.name}",
        "embeddings": towers.embed_dim,
        "parameters": f"{sum(each.numel() for each in towers.model.parameters()):,}",
        "logit scale": f"{towers.logit_scale():.4g}",
        "quick_gelu": model_fields(config.model)["quick_gelu"],
    }


def _training(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    sources = {name: source for name, source in config.data.sources.items() if source.weight > 0}
    optim = config.optim
    return {
        "data": ", ".join(f"{name} (weight {source.weight:g})" for name, source in sources.items()),
        "samples seen": f"{state['position']:,}",
        "steps": f"{state['step']:,}",
        "global batch": f"{config.train.global_batch:,}",
        "optimizer": ", ".join([optim.kind, *_said(optim), f"weight decay {optim.weight_decay:g}"]),
        "learning rate": schedule_lines(config)[0].partition(": ")[2],
        "precision": config.train.precision,
        "seed": config.seed,
        "began with": config.model.init or "random weights",
    }


def _said(optim: Optim) -> list[str]:
    """What the settings say of the optimizer, beside its decay."""
    words = {name: list(value) if name == "betas" else value for name, value in optim.moments.items()}
    words |= {name: getattr(optim, name) for name in ("momentum", "update_clipping", "layer_decay")}
    return [f"{name} {value}" for name, value in (words | optim.options).items() if value is not None]


def _scores(checkpoint: Path, step: int) -> dict[str, Any]:
    """The newest of each evaluation, up to this step, by the run's own rows."""
    run = checkpoint.parent if checkpoint.name == "best" else checkpoint.parent.parent
    scores = {}
    for row in read_rows(run / "metrics.jsonl"):
        if row.get("step", step + 1) <= step:
            scores |= {name: (value, row["step"]) for name, value in row.items() if _is_score(name, value)}
    return {
        f"{name} (step {at:,})": f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for name, (value, at) in scores.items()
    }


def _is_score(name: str, value: Any) -> bool:
    other = name.startswith("seconds/") or name.endswith("/failed") or "/" not in name
    return not other and isinstance(value, int | float)


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])

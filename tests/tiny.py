"""The smallest model and training that go all the way: for tests of what surrounds them."""

from pathlib import Path

import torch

from clipscale.checkpoint import RunState, Snapshot, save_checkpoint
from clipscale.config import Config, Model
from clipscale.config.data import Data, SourceSettings
from clipscale.config.load import config_from_yaml, load_config
from clipscale.towers import Towers, build_towers

YAML = """
run: {{dir: {run}, log_every_steps: 1}}
model:
  embed_dim: 16
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}}
  text: {{context_length: 8, width: 32, heads: 2, layers: 1}}
data: {{sources: {{mine: {{urls: "{urls}"}}}}, threads: 1, loader: inline}}
train: {{global_batch: 8, samples: 32}}
gradcache: {{image_chunk: 3, text_chunk: 5, keep_bytes: 0}}
"""
MODEL = config_from_yaml(YAML.format(run="run", urls="x.tar")).model


def write_config(folder: Path, urls: str) -> str:
    """folder/tiny.yaml: four steps of eight pairs on the shards `urls`, in folder/run. Gives its path."""
    path = folder / "tiny.yaml"
    path.write_text(YAML.format(run=folder / "run", urls=urls))
    return str(path)


def tiny_config(folder: Path, urls: str, *words: str) -> Config:
    """The same, loaded, with `key=value` words on top."""
    return load_config([write_config(folder, urls), *words])


def save_run(folder: Path, model: Model = MODEL, step: int = 4) -> Towers:
    """folder as that of a run with one checkpoint, untrained; its towers, whose weights are far from fresh ones."""
    towers, draw = build_towers(model, seed=5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in towers.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        towers.model.logit_scale.fill_(3.0)
    config = Config(model=model, data=Data(sources={"mine": SourceSettings("x.tar")}))
    state = towers.model.state_dict()
    save_checkpoint(str(folder), Snapshot(step, 8 * step, state, {"state": {}}, RunState(), config), keep=1)
    towers.model.eval()
    return towers

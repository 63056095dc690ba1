"""The smallest model and training that go all the way: for tests of what surrounds them."""

from pathlib import Path

from clipscale.config import Config
from clipscale.config.load import config_from_yaml, load_config

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

"""The files of a run made ready before it reads them: the shapes set drawn, shards indexed. No torch import.

for line in prepare_files(config, None):  # by one process a node; again at once where all is there
    tell(line)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from clipscale.config import Config, ZeroShot
from clipscale.config.data import SourceSettings
from clipscale.data.pipeline import check_layout
from clipscale.data.shapes.make import make_shapes
from clipscale.data.source import open_source
from clipscale.eval.wds import labelled_shards
from clipscale.progress import progress_bar, track


def prepare_files(config: Config, recorded: dict[str, Any] | None) -> list[str]:
    """Draw the shapes set if the config asks for it, and index every shard that has no current index and whose samples
    are not declared.

    Args:
        recorded: as for `build_pipeline`; None: a new run, and the order of its samples is tried too.

    Returns:
        A line for each shard that changed: whoever opens the sources later finds their indexes current.

    Raises:
        UserError: a shard that cannot be read, no usable sample, or a batch that is larger than the data.
    """
    data = config.data
    if data.shapes is not None:
        shapes = dataclasses.asdict(data.shapes)
        with progress_bar("drawing the shapes set") as progress:
            make_shapes(shapes.pop("dir"), **shapes, progress=progress)
    trained = {name: source for name, source in data.sources.items() if source.weight > 0}
    content = recorded["content"] if recorded else {}
    opened = [
        open_source(name, source, data, need="pairs", track=track, recorded=content.get(name))
        for name, source in trained.items()
    ]
    if recorded is None:
        check_layout(opened, data, seed=config.seed, global_batch=config.train.global_batch)
    for name, its in config.eval.evaluations().items():
        if not isinstance(its, ZeroShot):
            opened.append(open_source(name, config.held_out(its), data, need="pairs", track=track))
        elif urls := labelled_shards(its, data, config.eval.key(name)).urls:
            opened.append(open_source(name, SourceSettings(urls), data, need="labelled", track=track))
    return [line for source in opened for line in source.changes()]

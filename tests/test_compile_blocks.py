"""clipscale/towers/compiled.py: blocks by torch.compile in both passes, few graphs, the same gradients to rounding."""

from __future__ import annotations

import re

import pytest
import torch
from test_checkpoint_blocks import step_gradients, towers_of
from test_gradcache import make_batch, worst_error
from test_planning import ALONE
from tiny import tiny_config
from torch import nn

from clipscale.config import TowerSettings
from clipscale.errors import UserError
from clipscale.step.costs import graph_costs
from clipscale.step.planning import plan_step
from clipscale.towers import compiled
from clipscale.towers.compiled import compile_blocks

ON = TowerSettings(compile=True)


def test_blocks_that_are_not_known():
    with pytest.raises(UserError, match=r"^towers\.compile=true: the blocks of Linear are not known; set it to false"):
        compile_blocks("text", nn.Linear(2, 2))


def test_dropout_by_chunk_is_refused(tmp_path):
    config = tiny_config(tmp_path, "x.tar", "towers.compile=true")
    said = r"^towers\.compile=true, but the text tower draws by chunk \(\['transformer\.resblocks\.0\.mlp\.drop'\]\)"
    with pytest.raises(UserError, match=said):
        plan_step(config, towers_of(TowerSettings(), dropout=True), ALONE, None)


def test_more_graphs_than_there_may_be_are_an_error(monkeypatch):
    """Two lengths and one graph, which nobody compiles further."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    monkeypatch.setattr(compiled, "_Told", lambda name: "eager")
    compiled._compiled.cache_clear()
    tower = towers_of(ON).text
    tower(torch.ones(2, 8, dtype=torch.int64))
    tower(torch.ones(5, 8, dtype=torch.int64))  # other rows are the same graph
    with pytest.raises(UserError, match=r"^towers\.compile=true: FastBlock wants more graphs than 1; set it to false$"):
        tower.encoder(torch.ones(2, 6, dtype=torch.int64))
    compiled._compiled.cache_clear()


@pytest.mark.slow
def test_gradients_are_those_of_blocks_as_they_come(caplog):
    """Both passes, some graphs kept, drop path by position; other draws want no graph more, other rows one for a piece
    behind a drop path, once, and an evaluation none. And every block checkpointed too."""
    torch._dynamo.reset()
    ours, counts = towers_of(ON, "timm"), []
    with caplog.at_level("WARNING", "clipscale"):
        for seed, kept in ((0, 4), (1, 0)):
            ours.model.zero_grad()
            loss, found = step_gradients(ours, kept=kept, seed=seed)
            wanted_loss, wanted = step_gradients(towers_of(TowerSettings(), "timm"), kept=kept, seed=seed)
            assert abs(loss - wanted_loss) <= 1e-5
            assert worst_error(found, wanted) <= 1e-5
            counts.append(len(graphs(caplog)))
        assert ours.draws_by_chunk() == {"image": [], "text": []}
        assert len(graphs(caplog)) == counts[0]
        assert all(cost.sample > 1000 for cost in graph_costs(ours))
        counts.append(len(graphs(caplog)))
        ours.image(make_batch(5)[0])
        ours.text(make_batch(5)[1])
        ours.model.eval()
        ours.image(make_batch(5)[0])
        counts.append(len(graphs(caplog)))
        both = towers_of(TowerSettings(compile=True, checkpoint_blocks=True), "timm")
        assert worst_error(step_gradients(both, seed=1)[1], wanted) <= 1e-5
    assert counts[0] == counts[1] <= 12
    assert counts[2] == counts[3] <= 16
    assert len(graphs(caplog)) <= 2 * counts[2]


def graphs(caplog) -> list[str]:
    told = r"towers\.compile: graph \d+ of the (image|text) tower's blocks, with(out)? gradients, in [\d.]+ s"
    return [line for line in caplog.messages if re.fullmatch(told, line)]

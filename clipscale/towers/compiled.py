"""An encoder's blocks by torch.compile: few graphs, each told with the time it took.

    compile_blocks("text", encoder)       # once, after building and before blocks are checkpointed

Blocks of one kind share their graphs: one with gradients and one without for each length of captions, of which there
are few (rows.py), and one of each for pictures; the number of rows is free. Pass 1, pass 2 and kept graphs run the same
way. A number of graphs that goes beyond a bound is an error and not a slow run.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, nn

from clipscale.errors import UserError
from clipscale.tell import tell
from clipscale.towers.blocks import known_blocks
from clipscale.towers.draws import TimmDropPath

MOST_GRAPHS = 32  # of one kind of blocks: up to 77 tokens there are 5 lengths, each with gradients and without


class _DropPath(TimmDropPath):
    """Between two graphs: its keys and its rate are constants, with which every block would have graphs of its own."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _Compiled:
    def forward(self, x: Tensor, *args, **kwargs):
        if not self.training:
            return super().forward(x, *args, **kwargs)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            return self.compiled(self, x, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise UserError(
                f"towers.compile=true: {type(self).__name__} wants more graphs than {MOST_GRAPHS}; set it to false"
            ) from error


def compile_blocks(name: str, encoder: nn.Module) -> None:
    """Compile every block's forward in training mode; the modules and the state dict stay. `name`: of the tower.

    Raises:
        UserError: an encoder whose blocks are not known.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in known_blocks(encoder, "towers.compile"):
        block.__class__ = _compiled(type(block), name)
        for module in block.modules():
            if type(module) is TimmDropPath:
                module.__class__ = _DropPath


@cache
def _compiled(kind: type[nn.Module], name: str) -> type[nn.Module]:
    forward = torch.compile(kind.forward, backend=_Told(name), recompile_limit=MOST_GRAPHS)
    return type(kind.__name__, (_Compiled, kind), {"__module__": kind.__module__, "compiled": staticmethod(forward)})


class _Told:
    """Inductor, with a line for each graph."""

    def __init__(self, name: str) -> None:
        self._name, self._graphs = name, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from torch._inductor.compile_fx import compile_fx

        begin = time.perf_counter()
        compiled = compile_fx(graph, inputs)
        self._graphs += 1
        way = "with gradients" if torch.is_grad_enabled() else "without gradients"
        tell(
            f"towers.compile: graph {self._graphs} of the {self._name} tower's blocks, {way}, in "
            f"{time.perf_counter() - begin:.1f} s"
        )
        return compiled

"""What to do where memory runs out in the middle of a run, in one line.

    with shortage_explained(step=7, plan=plan, settings=config.gradcache):
        gradcache_step(...)              # UserError: step 7: out of memory (...); lower gradcache.keep_bytes (...), ...

The step cannot be tried again with less: its randomness may go by chunk, and other ranks wait in the middle of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipscale.config import GradCache
from clipscale.device import is_out_of_memory
from clipscale.errors import UserError
from clipscale.step.plan import StepPlan


@contextmanager
def shortage_explained(*, step: int, plan: StepPlan, settings: GradCache) -> Iterator[None]:
    """Raises UserError where memory runs out within, on a GPU or on the host."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(_fix(step, plan, settings, error)) from error
        raise


def _fix(step: int, plan: StepPlan, settings: GradCache, error: Exception) -> str:
    said = ". ".join((str(error) or type(error).__name__).splitlines()[0].split(". ")[:2])  # torch goes on and on
    present = {
        "keep_bytes": (settings.keep_bytes, plan.image.keep_bytes),
        "image_chunk": (settings.image_chunk, plan.image.chunk),
        "text_chunk": (settings.text_chunk, plan.text.chunk),
    }
    if not plan.image.keep_bytes:
        del present["keep_bytes"]
    *others, last = (
        f"gradcache.{name} ({'auto: ' if setting == 'auto' else ''}{value:,})"
        for name, (setting, value) in present.items()
    )
    return f"step {step}: out of memory ({said}); lower {', '.join(others)} or {last}"

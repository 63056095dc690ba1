"""One training step under gradient caching: `gradcache_step` and the plan it follows."""

from clipscale.step.gradcache import StepResult, gradcache_step
from clipscale.step.plan import GraphCost, StepPlan, TowerPlan
from clipscale.step.trace import Trace

__all__ = ["GraphCost", "StepPlan", "StepResult", "TowerPlan", "Trace", "gradcache_step"]

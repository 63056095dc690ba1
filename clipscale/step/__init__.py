"""One training step under gradient caching: `gradcache_step` and the plan it follows."""

from clipscale.step.gradcache import StepResult, gradcache_step
from clipscale.step.plan import GraphCost, StepPlan, TowerPlan

__all__ = ["GraphCost", "StepPlan", "StepResult", "TowerPlan", "gradcache_step"]

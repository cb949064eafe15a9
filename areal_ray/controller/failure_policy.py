"""Ray Train's failure policy, replaced by a RestartPolicy."""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling import FailurePolicy as RayFailurePolicy

from areal_ray.controller.restart_policy import RestartPolicy


class FailurePolicy(RayFailurePolicy):
    """Tells Ray Train's controller the decisions of a RestartPolicy, which counts failures in the place of Ray.

    Args:
        rules: that decide.
    """

    def __init__(self, rules: RestartPolicy) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._rules = rules

    @property
    def troubled(self) -> bool:
        """Whether failures come one right after the other, without a checkpoint in between."""
        return self._rules.troubled

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        return FailureDecision.RETRY if self._rules.should_restart(training_failed_error) else FailureDecision.RAISE

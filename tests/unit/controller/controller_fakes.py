"""What the policies of Ray Train's controller are given in their tests instead of a cluster."""

from types import SimpleNamespace

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from areal_ray.controller.scaling_policy import ScalingPolicy


class Control:
    """What was asked for, in memory."""

    def __init__(self):
        self.reason, self.asks, self.away = None, [], False

    def ask(self, reason):
        self.asks.append(reason)

    def asked(self):
        if self.away:
            raise ConnectionError("no head node")
        return self.reason

    def done(self): ...


class Count(ScalingPolicy):
    """A ScalingPolicy that is told how much room there is."""

    def __init__(self, control, run, sizes=(1, 2, 4)):
        super().__init__(ScalingConfig(num_workers=(sizes[0], sizes[-1])), sizes, control, run)
        self.room, self.free, self.requests = 0, 8, 0

    def _maybe_send_resource_request(self):
        self.requests += 1

    def _room(self, ask=False):
        return self.room

    def _free(self):
        return self.free

    def start(self):
        decision = self.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def look(self, running):
        self._looked = float("-inf")
        self.poll(running)

    def poll(self, running):
        state = SimpleNamespace(num_workers=running, start_time=float("-inf"))
        assert isinstance(self.make_decision_for_running_worker_group(state, None), NoopDecision)

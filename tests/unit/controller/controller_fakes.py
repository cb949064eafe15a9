"""Stand-ins for a cluster, and failures of workers, for the policies of Ray Train's controller."""

import pickle
from copy import copy
from types import SimpleNamespace

from ray.exceptions import ActorDiedError
from ray.train import ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.console import say
from areal_ray.cluster.failures import annotate
from areal_ray.controller.scaling_policy import ScalingPolicy
from areal_ray.controller.worker_count import WorkerCount

RETRY, RAISE = True, False
RAPID_S = 60.0
RESET = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4411")


class Clock:
    """Seconds that pass when a test says so; `step` of them at every look."""

    def __init__(self, step=0.0):
        self.now, self.step = 1000.0, step

    def __call__(self):
        self.now += self.step
        return self.now


class MemoryRequests:
    """Requests in memory."""

    def __init__(self):
        self.reason, self.asks, self.away = None, [], False

    def ask(self, reason):
        self.asks.append(reason)

    def asked(self):
        if self.away:
            raise ConnectionError("no head node")
        return self.reason

    def clear_resize(self): ...


def worker_count(requests, run, clock, sizes=(1, 2, 4)):
    return WorkerCount(sizes, requests, run, BadNodes(run, say), {"CPU": 1}, say, clock=clock)


class Scaling(ScalingPolicy):
    """A ScalingPolicy that is told how much room there is."""

    def __init__(self, requests, count, look_s=0.0):
        config = ScalingConfig(num_workers=(count.sizes[0], count.sizes[-1]))
        super().__init__(config, count, count._bad_nodes, requests, look_s=look_s, pause_s=0.0)
        self.room, self.free, self.machine_requests = 0, 8, 0

    def _maybe_send_resource_request(self):
        self.machine_requests += 1

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


def raised(error, step):
    """The exception as the controller gets it from a worker that computed `step`."""
    try:
        raise copy(error)  # some tests share one, and each raising would add to its notes
    except type(error) as caught:
        annotate(caught, step)
        return pickle.loads(pickle.dumps(caught))  # noqa: S301


def failed(*errors, step=6):
    """What the controller decides on: the exceptions of the ranks, of which dead ones cannot say their step."""
    seen = [error if isinstance(error, ActorDiedError) else raised(error, step) for error in errors]
    return WorkerGroupError("failed", dict(enumerate(seen)))


def decide(restarts, *failures):
    return [restarts.should_restart(failure) for failure in failures]

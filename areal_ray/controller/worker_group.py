"""Worker group of Ray Train's controller, extended: it does not wait for the dead, and its start is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
)
from ray.util.placement_group import PlacementGroup

from areal_ray.cluster import waiting
from areal_ray.cluster.console import say
from areal_ray.cluster.requests import AWAY
from areal_ray.cluster.standbys import Standbys
from areal_ray.controller.placement import PlacementGroupCache, release_all
from areal_ray.run import RunDir

_SAY_S = 5.0  # between two looks at what a group waits for
_CALM_S = 8.0  # after the start of the workers; processes that are started then are not in their way


class _Handle(DefaultPlacementGroupHandle):
    """Ray's, but timed, it says what it waits for, and its placement group may be kept when it ends.

    Args:
        reserved: the placement group.
        reached: see `Group`.
        explain: says what it waits for; AWAY if the head node is away.

    Attributes:
        keep: called then with the placement group instead of removing it.
    """

    def __init__(self, reserved: PlacementGroup, reached: dict[str, float], explain: Callable[[], str] = str) -> None:
        super().__init__(reserved)
        self._reached, self._explain, self._said = reached, explain, ""
        self.keep: Callable[[PlacementGroup], None] | None = None

    def wait(self, timeout_seconds: float = 30) -> bool:
        left = timeout_seconds
        while not (there := super().wait(min(left, _SAY_S))) and (left := left - _SAY_S) > 0:
            with suppress(*AWAY):
                if (text := self._explain()) != self._said:
                    self._said = text
                    say(text)
        self._reached["placed"] = time.time()
        return there

    def shutdown(self) -> None:
        if self.keep:
            self.keep(self.placement_group)
        else:
            super().shutdown()


class Group(WorkerGroup):
    """Ray's, with a placement group that outlives it, unless it is aborted.

    And it gives that back when the workers die while they start: Ray's forgets a group that was half up, and the next
    one waits for resources that nobody uses.

    Args:
        placement_groups: the cache to take it from.
        ending: process ids of the group before, by node id.
        options: as for WorkerGroup.

    Attributes:
        ending: as above.
        reached: when the start in progress came how far: "placed", there is room; "ready", processes with everything
            imported, that can form a process group.
    """

    def __init__(self, placement_groups: PlacementGroupCache, ending: dict[str, list[int]], **options: Any) -> None:
        super().__init__(**options)
        self._placement_groups, self.ending = placement_groups, ending
        self.reached: dict[str, float] = {}

    @property
    def processes(self) -> dict[str, list[int]]:
        """Process ids by node id, of a group that has started."""
        found: dict[str, list[int]] = {}
        for worker in self.get_workers():
            found.setdefault(worker.metadata.node_id, []).append(worker.metadata.pid)
        return found

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> PlacementGroupHandle:
        wanted = worker_group_context
        reserved = self._placement_groups.acquire(self._train_run_context, wanted)

        def explain() -> str:
            return waiting.room(wanted.num_workers, wanted.resources_per_worker, reserved.id.hex())

        return _Handle(reserved, self.reached, explain)

    def shutdown(self) -> None:
        """End the workers. Their placement group is kept for those that come next."""
        if self.has_started():
            wanted = self._worker_group_context
            handle = self._worker_group_state.placement_group_handle
            handle.keep = lambda reserved: self._placement_groups.retain(reserved, wanted)
        super().shutdown()

    def abort(self) -> None:
        super().abort()
        self._placement_groups.release()


class Groups:
    """Makes one group after the other, for Ray's controller, which takes this for their class.

    Args:
        placement_groups: for all of them.
    """

    def __init__(self, placement_groups: PlacementGroupCache) -> None:
        self._placement_groups = placement_groups
        self._ending: dict[str, list[int]] = {}

    def create(self, **options: Any) -> Group:
        group = Group(self._placement_groups, self._ending, **options)
        group._start()
        self._ending = group.processes  # by the time that there is another one
        return group


class GroupLife(WorkerGroupCallback, ControllerCallback):
    """Ends workers at once, limits their start, and notes its phases; a callback of Ray's controller.

    Args:
        run: the run directory.
        start_limit_s: workers that have not all begun to train by then are ended, which counts as a failed start.
        standbys: for the actors that Ray Train starts beside every group; None for none.
        clock: seconds since the epoch.
        timer: calls a function after so many seconds.
    """

    def __init__(
        self,
        run: RunDir,
        start_limit_s: float,
        standbys: Standbys | None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[float, Callable[[], None]], threading.Timer] = threading.Timer,
    ) -> None:
        self._run, self._limit, self._standbys = run, start_limit_s, standbys
        self._clock, self._timer = clock, timer
        self._times: dict[str, float] = {}
        self._replenish_at = float("inf")
        self._workers: list[Any] = []

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        self._workers = []
        timer = self._timer(self._limit, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:  # a start that fails, too: or it would end the next group
            timer.cancel()

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._context = train_run_context

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._times["noticed"] = self._clock()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._times |= {"begin": self._clock()}

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._workers = workers
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._times |= {**worker_group.reached, "process_group": self._clock()}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._replenish_at = time.monotonic() + _CALM_S
        at = self._times
        phases = {
            "start_s": at["placed"] - at["begin"],
            "imports_s": at["ready"] - at["placed"],
            "process_group_s": at["process_group"] - at["ready"],
            "launch_s": self._clock() - at["process_group"],
        }
        noticed = at.pop("noticed", None)
        if "end" in at:
            teardown = phases["teardown_s"] = at.pop("end") - at.pop("failed")
            if noticed is not None:  # the workers are torn down when others can be started
                phases["wait_s"] = max(0.0, at["begin"] - noticed - teardown)
        rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
        self._run.note("group", say, workers=len(self._workers), **rounded)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._standbys and time.monotonic() > self._replenish_at:
            self._standbys.replenish()
            self._replenish_at = float("inf")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._times["failed"] = self._clock()
        for worker in worker_group.get_workers():
            # Ray would first ask each of them, and wait five seconds for one that cannot answer.
            ray.kill(worker.actor)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._times["end"] = self._clock()

    def _give_up(self) -> None:
        say(f"the workers have not started in {self._limit:.0f} s: starting them again")
        for worker in self._workers:
            ray.kill(worker.actor)
        release_all(self._context)  # and with them the processes there, known by now or not

"""Ray Train's watch for nodes that are about to be taken away, in a thread instead of a process."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher


class ThreadedPreemptionCallback(PreemptionCallback):
    """Polls for node preemption in a thread of the controller.

    Ray's own watcher is an actor: one more process to start with every group of workers, which wakes up a hundred times
    a second ever after.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        ranks, actors = defaultdict(list), {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks[worker.metadata.node_id].append(rank)
            actors[rank] = worker.actor
        self._watcher = PreemptionWatcher(dict(ranks), self._poll_interval_s, actors)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None

"""Requests to a job to save and leave, passed between the driver, the controller and the workers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from areal_ray.cluster import ray_internals
from areal_ray.distributed import RankError
from areal_ray.run.fence import RunTaken

Request = Literal["stop", "resize"]
Reason = Literal["stop", "resize", "preempted"]
_ALL: tuple[Request, ...] = ("stop", "resize")  # "stop" goes before everything else
_NAMESPACE = "areal_ray"
AWAY = (ray.exceptions.RayError, ConnectionError)  # raised by calls to the head node while it is away


class PlannedRestart(Exception):
    """The workers have saved and left, to be started again elsewhere or in another number. No failure."""


class StoppedWhileWaiting(RuntimeError):
    """The job was asked to stop when no worker ran."""


def is_planned(errors: dict[int, Exception]) -> bool:
    """Whether workers (exceptions by rank) left because they were asked to, whatever the others saw of it."""
    return any(isinstance(error, PlannedRestart) for error in errors.values())


def taken_over(errors: Iterable[BaseException | None]) -> str | None:
    """Why nothing is to be mended or written down: another job or attempt works on the run. None: it is not so.

    Args:
        errors: of workers, of the controller (and what it names as their `cause`).
    """
    for error in (each for outer in errors for each in (outer, getattr(outer, "cause", None))):
        if isinstance(error, RunTaken):
            return str(error)
        if isinstance(error, RankError) and error.only(RunTaken):
            return error.failures[0][1].partition(": ")[2]
    return None


class Requests(Protocol):
    """Requests to one job. Methods raise one of `AWAY` while the head node does not answer."""

    def ask(self, request: Request) -> None:
        """Have the workers save at the end of their step and leave, for good (stop) or to come back (resize)."""
        ...

    def asked(self) -> Request | None:
        """The request to the workers; to stop goes before everything else."""
        ...

    def clear_resize(self) -> None:
        """Take back a request to resize: the workers have left, and those that come next need not."""
        ...

    def close(self) -> None:
        """Forget everything, if the head node is still there to be told."""
        ...


def requests_to(job: str, fast_restarts: bool) -> Requests:
    """Open the requests to a job, in any of its processes.

    Args:
        job: unique to this submission, so that requests to an earlier one are not heard.
        fast_restarts: as in JobContext.
    """
    return StoredRequests(job) if fast_restarts else ActorRequests(job)


class StoredRequests:
    """Requests in Ray's key-value store. A call is one round trip to the head node, well under a millisecond.

    Args:
        job: unique to this submission.
    """

    def __init__(self, job: str) -> None:
        self._job = job

    def ask(self, request: Request) -> None:
        ray_internals.put(self._key(request))

    def asked(self) -> Request | None:
        return next((request for request in _ALL if ray_internals.get(self._key(request)) is not None), None)

    def clear_resize(self) -> None:
        ray_internals.delete(self._key("resize"))

    def close(self) -> None:
        with suppress(*AWAY):
            for request in _ALL:
                ray_internals.delete(self._key(request))

    def _key(self, request: Request) -> str:
        return f"{self._job}/{request}"


class _Mailbox:
    """Actor that holds the requests."""

    def __init__(self) -> None:
        self._requests: set[Request] = set()

    def add(self, request: Request) -> None:
        self._requests.add(request)

    def discard(self, request: Request) -> None:
        self._requests.discard(request)

    def first(self) -> Request | None:
        return next((request for request in _ALL if request in self._requests), None)


class ActorRequests:
    """Requests held by a named actor, for Ray's public API alone. It lives on the node of the process that opens it.

    When the actor dies, the first process that calls it opens another one; each puts its own requests back at its next
    call.

    Args:
        job: unique to this submission.
    """

    def __init__(self, job: str) -> None:
        self._job, self._mine = job, set[Request]()
        self._mailbox = self._open()

    def ask(self, request: Request) -> None:
        self._mine.add(request)
        self._call("add", request)

    def asked(self) -> Request | None:
        request: Request | None = self._call("first")
        return request

    def clear_resize(self) -> None:
        self._mine.discard("resize")
        self._call("discard", "resize")

    def close(self) -> None:
        with suppress(*AWAY):
            ray.kill(self._mailbox)

    def _open(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0)(_Mailbox)
        options = {"name": f"requests-{self._job}", "namespace": _NAMESPACE, "get_if_exists": True}
        return actor.options(scheduling_strategy=here, **options).remote()

    def _call(self, method: str, *arguments: Request) -> Any:
        try:
            return ray.get(getattr(self._mailbox, method).remote(*arguments))
        except ray.exceptions.ActorDiedError:  # a RayError that no waiting mends: the handle is that of a dead one
            self._mailbox = self._open()
            for request in list(self._mine):
                ray.get(self._mailbox.add.remote(request))
            return ray.get(getattr(self._mailbox, method).remote(*arguments))

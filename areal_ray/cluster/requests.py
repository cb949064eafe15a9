"""Asking a job to leave: a word in Ray's key-value store, between the driver, the controller and the workers."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

Reason = Literal["stop", "resize", "preempted"]
_NAMESPACE = b"areal_ray"
AWAY = (ray.exceptions.RayError, ConnectionError)  # what calls to the head node raise while it is away


class PlannedRestart(Exception):
    """The workers have saved and left, to be started again elsewhere or in another number. No failure."""


def is_planned(errors: dict[int, Exception]) -> bool:
    """Whether workers (exceptions by rank) left because they were asked to, whatever the others saw of it."""
    return any(isinstance(error, PlannedRestart) for error in errors.values())


class Control:
    """One job's requests. A call is one round trip to the head node, well under a millisecond.

    Args:
        job: unique to this submission, so that what was asked of an earlier one is not heard.
    """

    def __init__(self, job: str) -> None:
        self._job = job

    def ask(self, reason: Literal["stop", "resize"]) -> None:
        """Have the workers save at the end of their step and leave, for good (stop) or to come back (resize)."""
        _internal_kv_put(self._key(reason), b"1", namespace=_NAMESPACE)

    def asked(self) -> Literal["stop", "resize"] | None:
        """What the workers are asked for; to stop goes before everything else."""
        for reason in ("stop", "resize"):
            if _internal_kv_get(self._key(reason), namespace=_NAMESPACE) is not None:
                return reason
        return None

    def done(self) -> None:
        """The workers have left; those that come next are not asked to resize."""
        _internal_kv_del(self._key("resize"), namespace=_NAMESPACE)

    def close(self) -> None:
        """Forget everything, if the head node is still there to be told."""
        with suppress(*AWAY):
            for reason in ("stop", "resize"):
                _internal_kv_del(self._key(reason), namespace=_NAMESPACE)

    def _key(self, reason: str) -> bytes:
        return f"{self._job}/{reason}".encode()

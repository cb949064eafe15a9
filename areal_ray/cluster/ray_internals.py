"""The only place that names what is private to Ray: ray._private, ray._raylet, ray.core.generated, internal_kv."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def unseeded_actor_classes() -> Iterator[None]:
    """Let classes become actors', while the block lasts, without Ray's random generator being started for it.

    Every such class is given a random number. Forks of a process whose generator has started all go on with the same
    numbers: two workers that call one actor are taken for one.
    """
    import ray.actor

    own = ray.actor.ActorClassID
    size = len(own.nil().binary())
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(size)))
    try:
        yield
    finally:
        ray.actor.ActorClassID = own

"""Imports of the fork server before it forks: named here, above everything, and carried out in its process.

The fork server is told this module's name (processes/fork_server.py). Nothing may be imported at the top that imports
Ray: its C++ part keeps what it reads of the environment, which is known only once a process of the job has asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace

from areal_ray.cluster.ray_internals import SYNC_ACTOR
from areal_ray.config import ConfigError, ModelConfig
from areal_ray.processes.hidden_devices import hidden_devices

_BEFORE = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "areal_ray.data.batches",
    "areal_ray.data.packing",
    "areal_ray.data.splits",
    "areal_ray.data.tokenizers",
    "areal_ray.data.shuffle",
    "areal_ray.engine",
    "areal_ray.train.evaluation",
    "areal_ray.train.journal",
    "areal_ray.train.loop",
    "areal_ray.run",
    "areal_ray.train.tracking",
    # Ray's own imports.
    "click",
    "fsspec",
    "google.protobuf",
    "jsonschema",
    "msgpack",
    "pandas",
    "pyarrow.fs",
    "pydantic",
    "requests",
)
_AFTER = (
    "ray.train.torch",
    SYNC_ACTOR,
    "areal_ray.controller.rendezvous",
    "areal_ray.controller.trainer",
    "areal_ray.worker.main",
)


def prepare(model: ModelConfig | None) -> None:
    """Import and warm up, once for all forks, everything but Ray."""
    with hidden_devices():
        _import(_BEFORE)
        # A factory's module may import Ray, and a name on the hub may be asked for over the network.
        if model is not None and not model.factory and (not model.path or os.path.isdir(model.path)):
            with suppress(ConfigError):  # said elsewhere, to the user
                import_module("areal_ray.models").build_model(model)
        _warm_up()
    assert "ray" not in sys.modules, "something imports Ray before it knows the job"


def _warm_up() -> None:
    """Warm torch up, once for all forks. If it fails, each worker tries again (warm_start.warm) and logs why."""
    torch = sys.modules["torch"]
    threads = torch.get_num_threads()
    with suppress(Exception):
        import_module("areal_ray.engine.warmup").warm_up()
    torch.set_num_threads(threads)


def import_ray() -> None:
    """Import Ray as a process of a job does, after that process has shown its environment."""
    import ray  # in sight of the devices: it keeps what is visible now, and would give the forks none of them

    with hidden_devices(), _unseeded_actor_classes():
        _import(_AFTER)
    drawn = [_in_a_fork(lambda: bytes(ray.WorkerID.from_random().binary())) for _ in range(2)]
    if drawn[0] == drawn[1]:
        raise RuntimeError("forks of a process that has imported Ray would draw the same random numbers")


@contextmanager
def _unseeded_actor_classes() -> Iterator[None]:
    """Let classes become actors', while the block lasts, without starting Ray's random generator for their ids.

    Forks of a process that has started it all draw the same numbers: two workers that call one actor pass for one.
    """
    import ray.actor

    own = ray.actor.ActorClassID
    size = len(own.nil().binary())
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(size)))
    try:
        yield
    finally:
        ray.actor.ActorClassID = own


def _in_a_fork(work: Callable[[], bytes]) -> bytes:
    """Do `work` in a fork of this process; its result, a few bytes."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, work())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with open(ours, "rb") as result:
        return result.read()


def _import(names: Sequence[str]) -> None:
    for name in names:
        import_module(name)

"""What a template imports, and what of a process must be the same for it to be a copy; see template.py."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from areal_ray.config import ConfigError, Model

# Names of variables that are read when a library is loaded or imported.
_AT_IMPORT = re.compile(r"(LD|GLIBC|MALLOC|OMP|MKL|OPENBLAS|KMP|GOMP|HF|TRANSFORMERS|TORCH|PYTORCH|CUDA)_")
_MAY_DIFFER = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"}  # set again in each process
_OF_ACTORS = ("RAY_TRAIN_", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")  # read when they run
_BEFORE = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "areal_ray.data",
    "areal_ray.engine",
    "areal_ray.evaluation",
    "areal_ray.journal",
    "areal_ray.loop",
    "areal_ray.rundir",
    "areal_ray.tracking",
    # What Ray imports.
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
    "ray.train.v2._internal.execution.checkpoint.sync_actor",
    "areal_ray.process_group",
    "areal_ray.trainer",
    "areal_ray.worker",
)


def get_ready(model: Model | None) -> None:
    """Do once what every copy would have to do, but for what is Ray's."""
    _import(_BEFORE)
    # A factory's module may import Ray, and a name on the hub may be asked for over the network.
    if model is not None and not model.factory and (not model.path or os.path.isdir(model.path)):
        with suppress(ConfigError):  # said elsewhere, to the user
            import_module("areal_ray.models").build_model(model)
    rehearse()
    assert "ray" not in sys.modules, "something imports Ray before it knows the job"


def rehearse() -> None:
    """Do once what each worker would do. If it fails, each tries again, see standby.warm, and logs why it could not."""
    torch = sys.modules["torch"]
    threads = torch.get_num_threads()
    with suppress(Exception):
        import_module("areal_ray.rehearsal").rehearse()
    torch.set_num_threads(threads)


def import_ray() -> None:
    import ray.actor

    # Every class that becomes an actor's is given a random number. Ray's own would start its generator, and all copies
    # would go on with the same numbers: two workers that call one actor would be taken for one.
    own = ray.actor.ActorClassID
    size = len(own.nil().binary())
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(size)))
    try:
        _import(_AFTER)
    finally:
        ray.actor.ActorClassID = own
    drawn = [_in_a_copy(lambda: bytes(ray.WorkerID.from_random().binary())) for _ in range(2)]
    if drawn[0] == drawn[1]:
        raise RuntimeError("copies of a process that has imported Ray would draw the same random numbers")


def _in_a_copy(work: Callable[[], bytes]) -> bytes:
    """What it returns in a fork of this process: a few bytes."""
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


def of_ray(environment: dict[str, str]) -> dict[str, str]:
    """What Ray has read when it is imported; not what is added for single actors (by Ray Train, and in trainer.py)."""
    ours = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    return {name: value for name, value in ours.items() if not name.startswith(_OF_ACTORS)}


def at_import(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if _AT_IMPORT.match(k) and k not in _MAY_DIFFER}


def within(limits: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a process with its own limits of resources (soft, hard; -1 is none) may set these."""
    return all(own[kind][1] == -1 or 0 <= limits[kind][1] <= own[kind][1] for kind in own)


def python_path(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def inherit(request: dict[str, Any]) -> bool:
    """Take over what a process has from the one that started it; this one was started by another. Whether it could."""
    try:
        os.chdir(request["folder"])
        os.umask(request["umask"])
        os.sched_setaffinity(0, request["cores"])
        for kind, limits in request["limits"].items():
            resource.setrlimit(int(kind), tuple(limits))
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    except (OSError, ValueError) as error:
        print(f"a copy of the template cannot do as it is told: {error}", file=sys.stderr)
        return False
    return True

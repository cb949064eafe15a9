"""The table of all kinds of faults, what each needs, and how one sees that the run has survived it."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from areal_ray.tools.chaos import faults, machine, processes, unreadable
from areal_ray.tools.chaos.world import World


@dataclass(frozen=True)
class Here:
    """What this machine and this run have.

    Args:
        workers: in the run; one of several is on a node of its own.
        mounts: whether this process can have mounts of its own.
        own_storage: whether the run lies where chaos has it lie.
        storage_process: as for World.
        memory_groups: whether groups of processes can be given a limit of memory.
        compiler: whether a library can be made.
    """

    workers: int
    mounts: bool
    own_storage: bool
    storage_process: int | None
    memory_groups: bool
    compiler: bool

    @property
    def disk(self) -> bool:
        return self.mounts and self.own_storage


def nothing(here: Here) -> str | None:
    return None


def disk(here: Here) -> str | None:
    return None if here.disk else "a small disk, which takes root and no run.storage_path"


def server(here: Here) -> str | None:
    return None if here.storage_process else "--storage-process"


def second_node(here: Here) -> str | None:
    return None if here.workers > 1 else "a second worker"


def mounts(here: Here) -> str | None:
    return None if here.mounts else "mounts of its own, which takes root"


def groups(here: Here) -> str | None:
    return None if here.memory_groups else "a memory cgroup that can be written"


def library(here: Here) -> str | None:
    return None if here.compiler and here.own_storage else "gcc and no run.storage_path"


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        inject: does it to the run; to one of the world that the table is for.
        lacks: what it needs and is not here; None: it can be done.
        quiet: nobody has to start again: survived is a checkpoint later.
    """

    inject: Callable[[Any, random.Random], None]
    lacks: Callable[[Here], str | None] = nothing
    quiet: bool = False


KINDS: dict[str, Kind] = {
    "SIGKILL of a worker": Kind(partial(faults.one, signal.SIGKILL)),
    "SIGSEGV of a worker": Kind(partial(faults.one, signal.SIGSEGV)),
    "SIGSTOP of a worker": Kind(partial(faults.one, signal.SIGSTOP)),
    "SIGKILL of rank 0": Kind(faults.first),
    "SIGKILL of all workers": Kind(faults.every),
    "SIGKILL of the controller": Kind(partial(processes.send, signal.SIGKILL, World.controllers)),
    "SIGKILL of the driver": Kind(faults.driver),
    "SIGKILL during start": Kind(faults.start),
    "SIGKILL during restore": Kind(faults.restore),
    **{f"SIGKILL when {stage}": Kind(partial(faults.commit, stage)) for stage in faults.STAGES},
    "SIGKILL during retention": Kind(faults.retention),
    "the disk is full": Kind(faults.full_disk, disk),
    "a bit flips in a checkpoint": Kind(faults.flip),
    "a node is lost": Kind(faults.node, second_node),
    "the storage server stops": Kind(faults.storage_away, server),
    "SIGSTOP of the controller": Kind(partial(processes.send, signal.SIGSTOP, World.controllers)),
    "SIGSTOP of the driver for 5 s": Kind(processes.stop_driver, quiet=True),
    "SIGSTOP of the driver, another takes over": Kind(processes.take_over),
    "SIGTERM to the driver's group": Kind(partial(processes.group, signal.SIGTERM)),
    "SIGHUP to the driver's group": Kind(partial(processes.group, signal.SIGHUP)),
    "SIGKILL of the file writers": Kind(partial(processes.then_a_worker, World.file_writers)),
    "SIGSTOP of the file writers for 5 s": Kind(partial(processes.stop, World.file_writers), quiet=True),
    "SIGKILL of the memory keepers": Kind(partial(processes.then_a_worker, World.keepers)),
    "SIGSTOP of the memory keepers for 5 s": Kind(partial(processes.stop, World.keepers), quiet=True),
    "SIGKILL of the fork servers": Kind(partial(processes.then_a_worker, World.fork_servers)),
    "SIGSTOP of the fork servers for 5 s": Kind(partial(processes.stop, World.fork_servers), quiet=True),
    "SIGKILL of a raylet": Kind(partial(processes.node, World.raylet), second_node),
    "SIGSTOP of a raylet for 5 s": Kind(partial(processes.stop, World.raylet), second_node, quiet=True),
    "SIGKILL of a dashboard agent": Kind(partial(processes.node, World.agent), second_node),
    "SIGSTOP of a dashboard agent for 5 s": Kind(partial(processes.stop, World.agent), second_node, quiet=True),
    "SIGKILL of the gcs_server": Kind(processes.head),
    "SIGSTOP of the gcs_server for 5 s": Kind(partial(processes.stop, World.gcs), quiet=True),
    **{f"SIGKILL in second {n} of a start": Kind(partial(processes.early, n)) for n in processes.FIRST_SECONDS},
    "the file system is read-only": Kind(machine.read_only, disk),
    "/dev/shm is full": Kind(machine.full_shared_memory, mounts),
    "a worker has few descriptors": Kind(machine.few_descriptors),
    "a worker has no memory": Kind(machine.no_memory, groups),
    "a checkpoint cannot be read (EIO)": Kind(partial(unreadable.refuse, errno.EIO), library),
    "a checkpoint cannot be read (EACCES)": Kind(partial(unreadable.refuse, errno.EACCES), library),
    "a stranger has the keepers' names": Kind(machine.squat),
}


def look_around(workers: int, own_storage: bool, storage_process: int | None) -> Here:
    """What is here."""
    groups = machine.memory_groups() is not None
    return Here(workers, machine.can_mount(), own_storage, storage_process, groups, unreadable.compiler())


def possible(table: Mapping[str, Kind], here: Here, only: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The kinds of a table that can be tried, of those that are named, if any are; of the others what they lack.

    Raises:
        RuntimeError: if one that is named is not among the kinds that can be tried.
    """
    lacking = {name: lacks for name, kind in table.items() if (lacks := kind.lacks(here)) is not None}
    kinds = [kind for kind in table if kind not in lacking]
    if unknown := set(only) - set(kinds):
        raise RuntimeError(f"no such faults here: {', '.join(sorted(unknown))}; there are: {', '.join(kinds)}")
    return [kind for kind in kinds if kind in only] if only else kinds, lacking


def survived(kind: Kind, world: World, since: float) -> bool:
    """Whether the run has gone on after that time.

    The newest attempt has finished its first step; or, where nobody had to start again, there is a new checkpoint.
    """
    attempts, trained = world.run.events("attempt"), world.run.events("training")
    if kind.quiet and any(at > since for at in list(world.seen.values())):
        return True
    if not trained or not attempts or trained[-1]["attempt"] != attempts[-1]["attempt"]:
        return False
    return bool(trained[-1]["time"] > since)

"""The faults of `areal-ray chaos`: real signals to real processes, real damage to real files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from areal_ray.checkpoint.format.manifest import MANIFEST
from areal_ray.tools.chaos.world import World

_AWAY_S = 5.0  # how long storage stays away
_DISK_MB = 1024
_STAGES = {  # of a commit: what is there in the directory of the checkpoint
    "its directory is made": lambda names: True,
    "a shard is written": lambda names: any(name.endswith(".distcp") for name in names),
    ".metadata is written": lambda names: ".metadata" in names,
    "it is committed": lambda names: MANIFEST in names,
}


def possible(workers: int, disk: Path | None, storage_process: int | None, only: Sequence[str]) -> list[str]:
    """The kinds that can be tried, of those that are named, if any are.

    Args:
        workers: in the run; one of several is on a node of its own.
        disk, storage_process: as for World.
        only: names.

    Raises:
        RuntimeError: if one that is named is not among them.
    """
    without = {
        *([] if disk else ["the disk is full"]),
        *([] if storage_process else ["the storage server stops"]),
        *([] if workers > 1 else ["a node is lost"]),
    }
    kinds = [kind for kind in KINDS if kind not in without]
    if unknown := set(only) - set(kinds):
        raise RuntimeError(f"no such faults here: {', '.join(sorted(unknown))}; there are: {', '.join(kinds)}")
    return [kind for kind in kinds if kind in only] if only else kinds


def has_gone_on(world: World, since: float) -> bool:
    """Whether the newest attempt has finished its first step, after that time."""
    attempts, trained = world.run.events("attempt"), world.run.events("training")
    if not trained or not attempts or trained[-1]["attempt"] != attempts[-1]["attempt"]:
        return False
    return bool(trained[-1]["time"] > since)


def one(number: signal.Signals, world: World, draw: random.Random) -> None:
    world.kill(draw.choice(world.workers()[1:] or world.workers()), number)


def first(world: World, draw: random.Random) -> None:
    world.kill(world.workers()[0])


def every(world: World, draw: random.Random) -> None:
    for pid in world.workers():
        world.kill(pid)


def controller(world: World, draw: random.Random) -> None:
    for pid in world.processes("ray::Controller"):
        world.kill(pid)


def driver(world: World, draw: random.Random) -> None:
    world.restart_driver()


def start(world: World, draw: random.Random) -> None:
    """A worker dies, and one of those that take its place before it trains."""
    before = world.processes("ray::RayTrainWorker")
    every(world, draw)
    fresh = world.until("new workers", lambda: world.processes("ray::RayTrainWorker") - before)
    time.sleep(draw.uniform(0.0, 0.5))
    world.kill(draw.choice(sorted(fresh)))


def restore(world: World, draw: random.Random) -> None:
    """A worker dies, and one of those that take its place while it restores."""
    attempts = world.count("attempt")
    world.kill(draw.choice(world.workers()))
    world.until("another attempt", lambda: world.count("attempt") > attempts)
    time.sleep(draw.uniform(0.0, 0.5))
    world.kill(draw.choice(world.workers()))


def commit(stage: str, world: World, draw: random.Random) -> None:
    """Rank 0 dies when a save has come so far."""
    before = {name for *_, name in world.catalog.names()}

    def come_so_far() -> bool:
        for name in {name for *_, name in world.catalog.names()} - before:
            with suppress(FileNotFoundError):
                if _STAGES[stage](world.storage.sub(name).names()):
                    return True
        return False

    world.until(f"a save of which {stage}", come_so_far)
    first(world, draw)


def retention(world: World, draw: random.Random) -> None:
    """Rank 0 dies when an older checkpoint is being deleted: its manifest goes first."""
    known = {name for *_, name in world.catalog.names()}
    world.until(
        "a deletion", lambda: any(world.storage.sub(name).size(MANIFEST) is None for name in known & set(world.seen))
    )
    first(world, draw)


def full_disk(world: World, draw: random.Random) -> None:
    """Nothing can be written for a while; then a worker dies, so that the run must find its way from what there is."""
    assert world.disk
    ballast = world.disk / "ballast"
    failed, trouble = world.count("save_failed"), world.count("controller_trouble")
    try:
        world.until("a full disk", lambda: _filled(ballast))
        world.until(
            "a save that fails",
            lambda: world.count("save_failed") > failed or world.count("controller_trouble") > trouble,
        )
    finally:
        ballast.unlink()
    one(signal.SIGKILL, world, draw)


def _filled(ballast: Path) -> bool:
    """Take all but a few lines' room; False if the run took it first, which writes meanwhile."""
    with open(ballast, "wb") as file:
        status = os.statvfs(ballast.parent)
        try:
            os.posix_fallocate(file.fileno(), 0, max(4096, (status.f_bavail - 64) * status.f_frsize))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
    return True


def flip(world: World, draw: random.Random) -> None:
    """A bit of the newest checkpoint turns over, and a worker dies before there is another."""
    newest = world.newest()
    world.until("a checkpoint that is kept", lambda: world.newest() not in (None, newest))
    name = world.newest()
    assert name is not None
    directory = world.storage.sub(name)
    shard = next(file for file in sorted(directory.names()) if file.endswith(".distcp"))
    data = bytearray(directory.read(shard))
    data[len(data) // 2] ^= 1 << draw.randrange(8)
    world.damaged.add(name)
    directory.replace(shard, bytes(data))
    every(world, draw)


def node(world: World, draw: random.Random) -> None:
    world.change_node()


def storage_away(world: World, draw: random.Random) -> None:
    """Its server does not answer for a while; then a worker dies."""
    assert world.storage_process
    os.kill(world.storage_process, signal.SIGSTOP)
    try:
        time.sleep(_AWAY_S)
    finally:
        os.kill(world.storage_process, signal.SIGCONT)
    one(signal.SIGKILL, world, draw)


KINDS: dict[str, Callable[[World, random.Random], None]] = {
    "SIGKILL of a worker": partial(one, signal.SIGKILL),
    "SIGSEGV of a worker": partial(one, signal.SIGSEGV),
    "SIGSTOP of a worker": partial(one, signal.SIGSTOP),
    "SIGKILL of rank 0": first,
    "SIGKILL of all workers": every,
    "SIGKILL of the controller": controller,
    "SIGKILL of the driver": driver,
    "SIGKILL during start": start,
    "SIGKILL during restore": restore,
    **{f"SIGKILL when {stage}": partial(commit, stage) for stage in _STAGES},
    "SIGKILL during retention": retention,
    "the disk is full": full_disk,
    "a bit flips in a checkpoint": flip,
    "a node is lost": node,
    "the storage server stops": storage_away,
}


def small_disk(path: Path, stack: ExitStack) -> Path | None:
    """A disk that can be filled without harm, until the stack is left; None where nothing may be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "areal_ray_chaos", str(path)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
    return path

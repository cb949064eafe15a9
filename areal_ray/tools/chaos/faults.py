"""Faults of workers, checkpoints, nodes and storage: real signals to real processes, real damage to real files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from areal_ray.checkpoint.format.manifest import MANIFEST
from areal_ray.tools.chaos.world import World

_AWAY_S = 5.0  # how long storage stays away
_DISK_MB = 1024
STAGES = {  # of a commit: what is there in the directory of the checkpoint
    "its directory is made": lambda names: True,
    "a shard is written": lambda names: any(name.endswith(".distcp") for name in names),
    ".metadata is written": lambda names: ".metadata" in names,
    "it is committed": lambda names: MANIFEST in names,
}


def one(number: signal.Signals, world: World, draw: random.Random) -> None:
    pids = world.workers()  # none, where machines of a network are about to start them again
    if pids:
        world.kill(draw.choice(pids[1:] or pids), number)


def first(world: World, draw: random.Random) -> None:
    world.kill(world.workers()[0])


def every(world: World, draw: random.Random) -> None:
    for pid in world.workers():
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
                if STAGES[stage](world.storage.sub(name).names()):
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
    troubles = world.troubles()
    try:
        world.until("a full disk", lambda: _filled(ballast))
        world.until(
            "a save that fails",
            lambda: world.troubles() > troubles,
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


def small_disk(path: Path, stack: ExitStack) -> Path:
    """A disk that can be filled without harm, until the stack is left; for where one may mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "areal_ray_chaos", str(path)]
    subprocess.run(command, capture_output=True, check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
    return path

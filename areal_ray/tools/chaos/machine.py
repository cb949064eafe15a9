"""Faults of the machine under a run: no memory, no descriptors, a file system of which nothing but reading is left."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from areal_ray.tools.chaos.world import World

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>; Python has os.unshare from 3.12 on
_SHARED_MEMORY = Path("/dev/shm")
_CGROUPS = {  # by version: where groups are made, and the file with the limit
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}
_FEW_BYTES = 1 << 20
_SHARED_MB = 1024  # filled for real: a few object stores of a test cluster, 150 MB each
_FOUND_S = 20.0  # so long a process has to run into a limit


def can_mount() -> bool:
    """Whether processes here can have mounts of their own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "areal_ray_chaos", str(_SHARED_MEMORY)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def private_mounts() -> None:
    """Give this process, and what it starts from now on, mounts of its own, shared memory among them.

    To be called where `can_mount` says so, by a process that does nothing else: there is no way back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    size = ["mount", "-t", "tmpfs", "-o", f"size={_SHARED_MB}m", "areal_ray_chaos", str(_SHARED_MEMORY)]
    for command in (["mount", "--make-rprivate", "/"], size):
        subprocess.run(command, capture_output=True, check=True)


def read_only(world: World, draw: random.Random) -> None:
    """The file system of the run can be read only, as after an error of the disk; then a worker dies."""
    assert world.disk
    world.until("a file system without writers", lambda: _remount(world.disk, "ro"))
    try:
        time.sleep(_FOUND_S / 2)  # of saves and lines that fail; the ledger cannot tell of them now
    finally:
        _remount(world.disk, "rw")
    world.kill(draw.choice(world.workers()))


def _remount(disk: Path | None, how: str) -> bool:
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def full_shared_memory(world: World, draw: random.Random) -> None:
    """There is no more shared memory while the workers start again."""
    ballast = _SHARED_MEMORY / "ballast"
    try:
        with open(ballast, "wb") as file:
            status = os.statvfs(_SHARED_MEMORY)
            with suppress(OSError):  # somebody else took some of it
                os.posix_fallocate(file.fileno(), 0, max(4096, (status.f_bavail - 16) * status.f_frsize))
        attempts = world.count("attempt")
        world.kill(draw.choice(world.workers()))
        world.until("another attempt", lambda: world.count("attempt") > attempts)
    finally:
        ballast.unlink()


def few_descriptors(world: World, draw: random.Random) -> None:
    """A worker can open no more files until a save has failed, or it has ended; then it dies."""
    pid = world.workers()[-1]  # not the first: then the ledger could not say that a save has failed
    troubles, attempts = world.troubles(), world.count("attempt")
    with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
        world.hit()
        began = time.monotonic()
        world.until(
            "a worker that finds no descriptor",
            lambda: (
                world.troubles() > troubles or world.count("attempt") > attempts or time.monotonic() - began > _FOUND_S
            ),
        )
        if pid in world.workers():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    world.kill(pid)


def no_memory(world: World, draw: random.Random) -> None:
    """The kernel ends a worker whose memory group is full."""
    pid = draw.choice(world.workers())
    attempts = world.count("attempt")
    with _memory_group() as group:
        try:
            (group / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            return
        world.hit()
        began = time.monotonic()
        world.until(
            "a worker without memory",
            lambda: world.count("attempt") > attempts or time.monotonic() - began > _FOUND_S,
        )
        world.kill(pid)  # if it has asked for no more memory than it had


def memory_groups() -> Path | None:
    """Where groups of processes with a limit of memory can be made; None: nowhere here."""
    for folder, limit in _CGROUPS.items():
        if (folder / "cgroup.procs").is_file() and os.access(folder, os.W_OK):
            probe = folder / f"areal_ray_chaos-{os.getpid()}"
            with suppress(OSError):
                probe.mkdir()
                possible = (probe / limit).is_file()
                probe.rmdir()
                if possible:
                    return folder
    return None


@contextmanager
def _memory_group() -> Iterator[Path]:
    folder = memory_groups()
    assert folder is not None
    group = folder / f"areal_ray_chaos-{os.getpid()}"
    group.mkdir()
    try:
        (group / _CGROUPS[folder]).write_text(str(_FEW_BYTES))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):  # it has ended
                (folder / "cgroup.procs").write_text(pid)
        deadline = time.monotonic() + _FOUND_S
        while group.is_dir() and time.monotonic() < deadline:
            with suppress(OSError):  # one that was killed is about to go
                group.rmdir()
            time.sleep(0.05)


def squat(world: World, draw: random.Random) -> None:
    """Keepers of memory die, a stranger takes their names and answers nobody, and all workers die."""
    names = {path for path in _abstract_names() if b"areal_ray" in path}
    for pid in world.keepers():
        world.send(pid, signal.SIGKILL)
    for name in names:
        taken = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # of a process that lives
            taken.bind(b"\0" + name)
            taken.listen(0)
            world.kept_open.append(taken)
    for pid in world.workers():
        world.kill(pid)


def _abstract_names() -> set[bytes]:
    lines = Path("/proc/net/unix").read_bytes().splitlines()[1:]
    return {line.split()[-1][1:] for line in lines if line.split()[-1].startswith(b"@")}

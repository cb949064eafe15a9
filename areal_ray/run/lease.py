"""Lease of a run directory: one driver at a time works on it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from areal_ray.storage import Storage, set_obstacle_aside

_NAME = "driver.json"


class RunInUse(ValueError):
    """Another driver works on this run directory; the message says on which machine and as which process."""


@contextmanager
def hold_lease(
    run: Storage,
    lost: Callable[[], None],
    say: Callable[[str], None],
    *,
    renew_s: float = 3.0,
    expires_s: float = 15.0,
    settle_s: float = 0.3,
) -> Iterator[None]:
    """Holds the lease of a run directory while the block lasts.

    The lease of a driver that was killed is taken when it expires, or at once if that driver ran on this machine (and
    in this container). Clocks are not compared: a lease is alive if its file changes while one looks.

    Args:
        run: the run directory.
        lost: called, from another thread, if another driver has taken the lease because this one could not renew it.
        say: prints a line for the user.
        renew_s: seconds between two renewals.
        expires_s: seconds without a renewal after which a lease is taken; by default five renewals have failed by then.
        settle_s: seconds between writing the lease and reading it back: two drivers that find none may both write.

    Raises:
        RunInUse: if another driver is alive.
        OSError: if the storage cannot be read or written.
    """
    set_obstacle_aside(run, _NAME, lambda: run.read_range(_NAME, 0, 1), say)  # no driver has written it
    _wait_for_others(run, say, renew_s, expires_s)
    mine = {"id": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
    _write(run, mine)
    time.sleep(settle_s)
    if (now := _read(run)) is not None and now["id"] != mine["id"]:
        raise RunInUse(_sentence(run, now))
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(run, mine, lost, say, ended, renew_s), name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with suppress(OSError):  # it expires
            if (now := _read(run)) is not None and now["id"] == mine["id"]:
                run.remove(_NAME)


def holder(run: Storage) -> dict[str, Any] | None:
    """Who holds the lease of a run directory, as far as that is written: id, host, pid, boot, time of its last sign of
    life by its own clock; None if nobody does, or has died here without giving it back."""
    now = _read(run)
    return None if now is None or _has_died(now) else now


def wait_until_free(run: Storage, silent_s: float = 15.0, look_s: float = 0.5) -> None:
    """Wait until nobody works on a run: until its driver has given it back, has died here, or has been silent.

    Args:
        run: the run directory.
        silent_s: seconds without a sign of life after which a driver elsewhere counts as dead.
        look_s: seconds between two looks.

    Raises:
        OSError: if the storage cannot be read.
    """
    seen, since = holder(run), time.monotonic()
    while seen is not None and time.monotonic() - since < silent_s:
        time.sleep(look_s)
        if (now := holder(run)) != seen:
            seen, since = now, time.monotonic()


def let_go(run: Storage) -> None:
    """Give back the lease of this process, which is about to end without leaving the block (OSError)."""
    now = _read(run)
    here = (socket.gethostname(), _boot(), os.getpid())
    if now is not None and (now.get("host"), now.get("boot"), now.get("pid")) == here:
        run.remove(_NAME)


def _wait_for_others(run: Storage, say: Callable[[str], None], renew_s: float, expires_s: float) -> None:
    seen = _read(run)
    if seen is None or _has_died(seen):
        return
    began = time.monotonic()
    say(f"{_sentence(run, seen)}; waiting {expires_s:.0f} s to see whether it is alive")
    while time.monotonic() - began < expires_s:
        time.sleep(renew_s / 3)
        now = _read(run)
        if now is None:
            return
        if now != seen:
            raise RunInUse(_sentence(run, now))


def _keep(
    run: Storage,
    mine: dict[str, Any],
    lost: Callable[[], None],
    say: Callable[[str], None],
    ended: threading.Event,
    renew_s: float,
) -> None:
    while not ended.wait(renew_s):
        try:
            now = _read(run)
            if now is not None and now["id"] != mine["id"]:
                say(f"{_sentence(run, now)}, which has taken over: stopping")
                lost()
                return
            _write(run, mine)
        except OSError:  # storage is away; if that lasts, so it is for everybody
            continue


def _read(run: Storage) -> dict[str, Any] | None:
    try:
        found = json.loads(run.read(_NAME))
    except (FileNotFoundError, ValueError, RecursionError):  # none, or a torn one
        return None
    return found if type(found) is dict and type(found.get("id")) is str else None


def _write(run: Storage, mine: dict[str, Any]) -> None:
    run.replace(_NAME, json.dumps({**mine, "time": time.time()}).encode())


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead, because it ran here."""
    # Containers and machines may share a host name; of another's process numbers nothing is known here.
    if (holder.get("host"), holder.get("boot")) != (socket.gethostname(), _boot()):
        return False
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:  # it says nothing, and 0 would ask for our own process group
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def _boot() -> str:
    """Identifier of this start of the machine, or of this container's process numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not on Linux, or not to be seen
        return "unknown"


def _sentence(run: Storage, holder: dict[str, Any]) -> str:
    return f"{run.location} is in use by process {holder.get('pid')} on {holder.get('host')}"

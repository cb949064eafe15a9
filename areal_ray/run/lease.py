"""One driver at a time on a run directory."""

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

from areal_ray.storage import Storage

_NAME = "driver.json"
_RENEW_S = 3.0
_EXPIRES_S = 15.0  # without a renewal; five of them have failed by then
_SETTLE_S = 0.3  # between writing the lease and looking whose it is: two who find none may both write


class RunInUse(ValueError):
    """Another driver works on this run directory; says where."""


@contextmanager
def hold_lease(run: Storage, lost: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of a run directory while the block lasts.

    That of a driver which was killed is waited for until it expires, or taken at once if it ran on this machine (and in
    this container). Clocks are not compared: a lease is alive if its file changes while one looks.

    Args:
        run: the run directory.
        lost: called, from another thread, if somebody else has taken the lease: this driver was not heard of for long.
        say: prints a line for the user.

    Raises:
        RunInUse: if another driver is alive.
        OSError: if the storage cannot be read or written.
    """
    _wait_for_others(run, say)
    mine = {"id": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
    _write(run, mine)
    time.sleep(_SETTLE_S)
    if (now := _read(run)) is not None and now["id"] != mine["id"]:
        raise RunInUse(_sentence(run, now))
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(run, mine, lost, say, ended), name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with suppress(OSError):  # it expires
            if (now := _read(run)) is not None and now["id"] == mine["id"]:
                run.remove(_NAME)


def _wait_for_others(run: Storage, say: Callable[[str], None]) -> None:
    seen = _read(run)
    if seen is None or _has_died(seen):
        return
    began = time.monotonic()
    say(f"{_sentence(run, seen)}; waiting {_EXPIRES_S:.0f} s to see whether it is alive")
    while time.monotonic() - began < _EXPIRES_S:
        time.sleep(_RENEW_S / 3)
        now = _read(run)
        if now is None:
            return
        if now != seen:
            raise RunInUse(_sentence(run, now))


def _keep(
    run: Storage, mine: dict[str, Any], lost: Callable[[], None], say: Callable[[str], None], ended: threading.Event
) -> None:
    while not ended.wait(_RENEW_S):
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
        return dict(json.loads(run.read(_NAME)))
    except (FileNotFoundError, ValueError):  # none, or the half of one
        return None


def _write(run: Storage, mine: dict[str, Any]) -> None:
    run.replace(_NAME, json.dumps({**mine, "time": time.time()}).encode())


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead, because it ran here."""
    # Containers and machines may share a host name; of another's process numbers nothing is known here.
    if (holder.get("host"), holder.get("boot")) != (socket.gethostname(), _boot()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def _boot() -> str:
    """Tells one start of this machine (or of this container's process numbers) from another."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not on Linux, or not to be seen
        return "unknown"


def _sentence(run: Storage, holder: dict[str, Any]) -> str:
    return f"{run.location} is in use by process {holder.get('pid')} on {holder.get('host')}"

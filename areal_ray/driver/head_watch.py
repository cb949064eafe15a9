"""Watches the head node from the driver: Ray ends a driver that has lost it with an error page, and no result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from areal_ray.cluster.nodes import is_reachable

_RAY_GIVES_UP_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))


@contextmanager
def watching(
    address: str,
    say: Callable[[str], None],
    lost: Callable[[], None],
    *,
    look_s: float = 2.0,
    say_after_s: float = 6.0,
    lost_after_s: float = _RAY_GIVES_UP_S - 10.0,
) -> Iterator[None]:
    """Watches the head node's control store, from another thread, while the block lasts.

    Args:
        address: host:port of the store.
        say: prints a line for the user.
        lost: called once, from that thread, when the store counts as lost.
        look_s: seconds between two looks.
        say_after_s: seconds without an answer after which the user is told.
        lost_after_s: seconds without an answer after which the store counts as lost, but not before the user is told;
            by default 10 s before Ray itself gives up.
    """
    ended = threading.Event()
    limits = (look_s, say_after_s, max(say_after_s, lost_after_s))
    watcher = threading.Thread(target=_watch, args=(address, say, lost, ended, *limits), name="head", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(
    address: str,
    say: Callable[[str], None],
    lost: Callable[[], None],
    ended: threading.Event,
    look_s: float,
    say_after_s: float,
    lost_after_s: float,
) -> None:
    answered, said = time.monotonic(), False
    while not ended.wait(look_s):
        now = time.monotonic()
        if is_reachable(address):
            if said:
                say("the head node answers again")
            answered, said = now, False
        elif now - answered > lost_after_s:
            lost()
            return
        elif now - answered > say_after_s and not said:
            said = True
            say(f"the head node ({address}) does not answer; training goes on for now")

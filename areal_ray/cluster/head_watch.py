"""Watches the head node: Ray ends a driver that has lost it with an error page, and no result; and a worker that is cut
off from it trains on for minutes, while others have taken over."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from areal_ray.cluster.nodes import is_reachable

_QUICK_S = 0.1
_RAY_GIVES_UP_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))


@contextmanager
def watching(
    address: str,
    say: Callable[[str], None],
    lost: Callable[[], None],
    *,
    identity: Callable[[], str | None] = lambda: "",
    look_s: float = 2.0,
    say_after_s: float = 6.0,
    lost_after_s: float = _RAY_GIVES_UP_S - 10.0,
) -> Iterator[None]:
    """Watches the head node's control store, from another thread, while the block lasts.

    Args:
        address: host:port of the store.
        say: prints a line for the user.
        lost: called once, from that thread, when the store counts as lost.
        identity: of the cluster whose store answers; None if it does not say, "" if nobody asks. When it is another
            one after a silence, somebody has begun anew at this address, and the store is lost: the first call that Ray
            makes there ends this process. Until then one looks ten times a second.
        look_s: seconds between two looks.
        say_after_s: seconds without an answer after which the user is told.
        lost_after_s: seconds without an answer after which the store counts as lost, but not before the user is told;
            by default 10 s before Ray itself gives up.
    """
    ended = threading.Event()
    limits = (look_s, say_after_s, max(say_after_s, lost_after_s))
    arguments = (address, say, lost, identity, ended, *limits)
    watcher = threading.Thread(target=_watch, args=arguments, name="head", daemon=True)
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
    identity: Callable[[], str | None],
    ended: threading.Event,
    look_s: float,
    say_after_s: float,
    lost_after_s: float,
) -> None:
    answered, said, away, known = time.monotonic(), False, False, identity()
    while not ended.wait(min(look_s, _QUICK_S) if away and known else look_s):
        now = time.monotonic()
        there = is_reachable(address)
        if there and away and known:
            found = identity()
            if found is not None and found != known:
                lost()
                return
            there = found is not None
        away = not there
        if there:
            if said:
                say("the head node answers again")
            answered, said = now, False
        elif now - answered > lost_after_s:
            lost()
            return
        elif now - answered > say_after_s and not said:
            said = True
            say(f"the head node ({address}) does not answer; training goes on for now")

"""The head node, watched from the driver: Ray ends a driver that has lost it with a page of its own, and no result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from areal_ray.cluster.nodes import is_reachable

_LOOK_S = 2.0
_SAY_S = 6.0  # without an answer
_BEFORE_S = 10.0  # so long before Ray itself gives up, which is
_RAY_GIVES_UP_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))


@contextmanager
def watching(address: str, say: Callable[[str], None], lost: Callable[[], None]) -> Iterator[None]:
    """Look after the head node's control store while the block lasts.

    Args:
        address: host:port of the store.
        say: prints a line for the user.
        lost: called, from another thread, when it has not answered for so long that it will not come back in time.
    """
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(address, say, lost, ended), name="head", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(address: str, say: Callable[[str], None], lost: Callable[[], None], ended: threading.Event) -> None:
    answered, said = time.monotonic(), False
    while not ended.wait(_LOOK_S):
        now = time.monotonic()
        if is_reachable(address):
            if said:
                say("the head node answers again")
            answered, said = now, False
        elif now - answered > max(_SAY_S, _RAY_GIVES_UP_S - _BEFORE_S):
            lost()
            return
        elif now - answered > _SAY_S and not said:
            said = True
            say(f"the head node ({address}) does not answer; training goes on for now")

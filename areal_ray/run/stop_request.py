"""A request to save and leave, left in the run directory for the driver of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from areal_ray.run.lease import holder
from areal_ray.storage import Storage

STOP = "stop"


def ask_to_stop(run: Storage, wait_s: float = 30.0) -> None:
    """Ask whoever works on a run to save and leave; returns when that has been heard.

    Raises:
        ValueError: if nobody works on it, or no longer when it could have heard.
        TimeoutError: if nobody hears.
        OSError: if the directory cannot be written to.
    """
    if holder(run) is None:
        raise ValueError(f"nobody works on {run.location}")
    run.replace(STOP, b"")
    began = time.monotonic()
    while run.size(STOP) is not None:
        if holder(run) is None:
            with suppress(FileNotFoundError):
                run.remove(STOP)
            raise ValueError(f"nobody works on {run.location} any more")
        if time.monotonic() - began > wait_s:
            with suppress(FileNotFoundError):
                run.remove(STOP)
            raise TimeoutError(f"the driver of {run.location} did not hear of it within {wait_s:.0f} s")
        time.sleep(0.2)


@contextmanager
def hearing_stop(run: Storage, asked: Callable[[], None], look_s: float = 2.0) -> Iterator[None]:
    """Calls back, from another thread, when the run is asked to stop while the block lasts.

    Costs one look at one name every `look_s` seconds. A request that was left before does not count.
    """
    with suppress(FileNotFoundError, OSError):
        run.remove(STOP)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(look_s):
            try:
                if run.size(STOP) is not None:
                    run.remove(STOP)
                    asked()
            except OSError:  # storage is away; who asks is told that nobody heard
                continue

    thread = threading.Thread(target=look, name="stop requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""Child processes in sessions of their own, out of reach of signals to the process group of their parent."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def children_in_own_session() -> Iterator[list[int]]:
    """Give every process that this one starts, while the block lasts, a session of its own (setsid(2)).

    Yields their ids, which are those of their sessions and process groups, too.

    For libraries that start processes and do not ask. A signal to the process group (`timeout`, scancel, systemd,
    Ctrl-C, a terminal that is closed) would end a local Ray cluster before its workers could save. What ends such a
    process together with its parent (PR_SET_PDEATHSIG, a pipe) does so in another session, too.

    It replaces the constructor of `subprocess.Popen`, which every thread and every subclass uses meanwhile.
    """
    start, started = subprocess.Popen.__init__, list[int]()

    def start_in_own_session(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{"start_new_session": True, **kwargs})
        started.append(self.pid)

    subprocess.Popen.__init__ = start_in_own_session  # type: ignore[method-assign]
    try:
        yield started
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]

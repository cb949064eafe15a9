"""Lines for the user, from whatever process they come.

Ray brings the output of its processes to the driver. A `Console` shows lines that `say` printed as they are, others of
workers (a user's own prints, warnings) with their process, and leaves those of Ray's own actors in Ray's logs. A
`StockConsole` leaves the printing to Ray, which puts the process before every line.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol

from areal_ray.cluster.ray_internals import core_problems, worker_logs_printed, worker_logs_to

if TYPE_CHECKING:
    from areal_ray.cluster.live_line import LiveLine

_MARK = "[areal_ray] "
_LOG = "[areal_ray.log] "
_NEWS = "[areal_ray.news] "
_END = "\x04"
# Native and Python stacks of a process that crashes: pages, for the log and not for the screen.
_DUMP = re.compile(
    r"logging\.cc:\d+: |\(\+0x[0-9a-f]+\) \[0x|^\*\*\* |^Fatal Python error|^(Current )?[Tt]hread 0x"
    r'|^ *File "[^"]+", line \d+ in |^Extension modules: |^(PC: )?\s*@ +(0x|\.\.\.)|^ *<no Python frame>'
    r"|^Stack \(most recent call first"
)
# torch asks for the names of addresses, for messages of its own, and complains where there are none.
_NOISE = re.compile(r"\[c10d\] The hostname of the client socket cannot be retrieved")
_HANDLER = "areal_ray_console"


class _Marks:
    """Whether this process marks its lines for a `Console`."""

    on = True


def leave_out_marks() -> None:
    """Print the lines of this process as they are: no `Console` is there to take the marks off."""
    _Marks.on = False


def say(text: str) -> None:
    """Print a line for the user from a worker."""
    # Not `print`, which Ray Train replaces in its workers.
    sys.stdout.write(f"{_MARK if _Marks.on else ''}{text}\n")
    sys.stdout.flush()


def log(text: str) -> None:
    """Write lines into the worker's log that are too much for the screen; without a `Console` there is no such log."""
    for line in text.splitlines() if _Marks.on else ():
        sys.stdout.write(_LOG + line + "\n")
    sys.stdout.flush()


def tell(news: Mapping[str, Any]) -> None:
    """Tell the driver's live line how far the run is; where there is none, nobody is to call this."""
    sys.stdout.write(f"{_NEWS}{json.dumps(news)}\n")
    sys.stdout.flush()


def say_end() -> None:
    """Mark the end of a worker's lines, for the driver to wait for."""
    if _Marks.on:
        say(_END)


class Display(Protocol):
    """Shows the lines of the job's processes while the block lasts."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_for_end(self, timeout_s: float = 5.0) -> None:
        """Let lines that are under way arrive before the driver says its last."""
        ...


def display(fast_restarts: bool, live: bool = False) -> Display:
    """Make the display of a job (fast_restarts, live: as in JobContext)."""
    return Console(live) if fast_restarts else StockConsole()


class StockConsole:
    """Display by Ray itself.

    Args:
        delay_s: time that lines take to the driver: Ray looks for new ones several times a second.
    """

    def __init__(self, delay_s: float = 1.0) -> None:
        self._delay_s = delay_s

    def __enter__(self) -> StockConsole:
        self._stack = ExitStack()
        if not core_problems():  # a connection that is there may keep Ray from printing
            self._stack.enter_context(worker_logs_printed(True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_for_end(self, timeout_s: float = 5.0) -> None:
        time.sleep(min(timeout_s, self._delay_s))  # nothing tells that all have arrived


class Console:
    """Takes over the driver's display of worker output while the block lasts.

    Args:
        live: show how far the run is in a line that changes in its place; for terminals.
    """

    def __init__(self, live: bool = False) -> None:
        self._live: LiveLine | None = None
        if live:
            from areal_ray.cluster.live_line import LiveLine  # brings tqdm

            self._live = LiveLine()

    def __enter__(self) -> Console:
        self._ended = threading.Event()
        self._dumped: set[str] = set()  # processes that have crashed
        self._stack = ExitStack()
        if self._live is not None:
            self._stack.enter_context(self._live)
        self._stack.enter_context(worker_logs_printed(False))
        self._stack.enter_context(worker_logs_to(_HANDLER, self._show))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_for_end(self, timeout_s: float = 5.0) -> None:
        self._ended.wait(timeout_s)
        if self._live is not None:
            self._live.close()

    def _show(self, data: dict[str, Any]) -> None:
        foreign = "RayTrainWorker" not in str(data.get("actor_name"))
        where = "" if data.get("ip") == data.get("localhost") else f"@{data.get('ip')}"
        process = f"{data.get('pid')}{where}"
        for line in data.get("lines", []):
            if line.startswith(_NEWS):
                self._show_news(line[len(_NEWS) :])
            elif line.startswith(_MARK):
                self._show_marked(line[len(_MARK) :])
            elif foreign or not line.strip() or line.startswith(_LOG) or _NOISE.search(line):
                continue
            elif _DUMP.search(line):
                if process not in self._dumped:
                    self._dumped.add(process)
                    print(f"  [{process}] crashed while it ran or ended; its stacks are in its log", flush=True)
            else:
                print(f"  [{process}] {line}", flush=True)

    def _show_marked(self, text: str) -> None:
        if text == _END:
            self._ended.set()
        else:
            print(text, flush=True)

    def _show_news(self, text: str) -> None:
        if self._live is not None:
            with suppress(ValueError):  # another thread of the worker has printed in the middle; the next ones come
                self._live.show(json.loads(text))

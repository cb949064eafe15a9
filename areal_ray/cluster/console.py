"""Lines for the user, from whatever process they come, without Ray's prefixes.

Ray brings what its processes print to the driver. Lines that `say` printed are shown as they are; others from workers
(a user's own prints, warnings) with the process that they come from. What Ray's own actors say stays in Ray's logs.
"""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

import ray._private.worker as ray_worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher

_MARK = "[areal_ray] "
_LOG = "[areal_ray.log] "
_END = "\x04"
# What a process writes when it crashes: pages of native and Python stacks, for the log and not for the screen.
_DUMP = re.compile(
    r"logging\.cc:\d+: |\(\+0x[0-9a-f]+\) \[0x|^\*\*\* |^Fatal Python error|^(Current )?[Tt]hread 0x"
    r'|^ *File "[^"]+", line \d+ in |^Extension modules: |^(PC: )?\s*@ +(0x|\.\.\.)|^ *<no Python frame>'
    r"|^Stack \(most recent call first"
)
_HANDLER = "areal_ray_console"


def say(text: str) -> None:
    """Print a line for the user from a worker."""
    # Not `print`, which Ray Train replaces in its workers.
    sys.stdout.write(_MARK + text + "\n")
    sys.stdout.flush()


def log(text: str) -> None:
    """Write lines into the worker's log that are too much for the screen."""
    for line in text.splitlines():
        sys.stdout.write(_LOG + line + "\n")
    sys.stdout.flush()


def say_end() -> None:
    """Mark the end of what a worker has to say, for the driver to wait for."""
    say(_END)


class Console:
    """Takes over the driver's display of worker output while the block lasts."""

    def __enter__(self) -> Console:
        self._ended = threading.Event()
        self._dumped: set[str] = set()  # processes that have crashed
        # Ray's own printing, of worker output and of the raylet's accounts of dead workers.
        self._shown, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
        global_worker_stdstream_dispatcher.add_handler(_HANDLER, self._show)
        return self

    def __exit__(self, *_: object) -> None:
        global_worker_stdstream_dispatcher.remove_handler(_HANDLER)
        ray_worker._worker_logs_enabled = self._shown

    def wait_for_end(self, timeout_s: float = 5.0) -> None:
        """Let lines that are under way arrive before the driver says its last."""
        self._ended.wait(timeout_s)

    def _show(self, data: dict[str, Any]) -> None:
        foreign = "RayTrainWorker" not in str(data.get("actor_name"))
        where = "" if data.get("ip") == data.get("localhost") else f"@{data.get('ip')}"
        process = f"{data.get('pid')}{where}"
        for line in data.get("lines", []):
            if line.startswith(_MARK):
                self._show_marked(line[len(_MARK) :])
            elif foreign or not line.strip() or line.startswith(_LOG):
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

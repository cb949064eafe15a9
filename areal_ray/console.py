"""Lines for the user, from whatever process they come, without Ray's prefixes.

Ray brings what its processes print to the driver. Lines that `say` printed are shown as they are; others from workers
(a user's own prints, warnings) with the process that they come from. What Ray's own actors say stays in Ray's logs.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import ray._private.worker as ray_worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher

_MARK = "[areal_ray] "
_END = "\x04"
_HANDLER = "areal_ray_console"


def say(text: str) -> None:
    """Print a line for the user from a worker."""
    # Not `print`, which Ray Train replaces in its workers.
    sys.stdout.write(_MARK + text + "\n")
    sys.stdout.flush()


def say_end() -> None:
    """Mark the end of what a worker has to say, for the driver to wait for."""
    say(_END)


class Console:
    """Takes over the driver's display of worker output while the block lasts."""

    def __enter__(self) -> Console:
        self._ended = threading.Event()
        # Ray's own printing, of worker output and of the raylet's accounts of dead workers.
        ray_worker._worker_logs_enabled = False
        global_worker_stdstream_dispatcher.add_handler(_HANDLER, self._show)
        return self

    def __exit__(self, *_: object) -> None:
        global_worker_stdstream_dispatcher.remove_handler(_HANDLER)
        ray_worker._worker_logs_enabled = True

    def wait_for_end(self, timeout_s: float = 5.0) -> None:
        """Let lines that are under way arrive before the driver says its last."""
        self._ended.wait(timeout_s)

    def _show(self, data: dict[str, Any]) -> None:
        foreign = "RayTrainWorker" not in str(data.get("actor_name"))
        for line in data.get("lines", []):
            if line.startswith(_MARK):
                self._show_marked(line[len(_MARK) :])
            elif line.strip() and not foreign:
                where = "" if data.get("ip") == data.get("localhost") else f"@{data.get('ip')}"
                print(f"  [{data.get('pid')}{where}] {line}", flush=True)

    def _show_marked(self, text: str) -> None:
        if text == _END:
            self._ended.set()
        else:
            print(text, flush=True)

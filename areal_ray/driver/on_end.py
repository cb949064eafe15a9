"""The user's own word at the end of a run: a function or a command that is given its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from areal_ray.config import plugin

_LIMIT_S = 60.0  # one that waits for a network must not keep a cluster occupied
Say = Callable[[str], None]


def check_on_end(on_end: str | None) -> None:
    """Raise ConfigError if it names a function that is not there, or that does not take a result and a directory."""
    if on_end is not None and plugin.has_form(on_end):
        plugin.check_args(plugin.factory(on_end, "on_end", {}), on_end, "on_end", {}, "")


def tell_end(
    on_end: str | None, result: Mapping[str, Any], directory: str, say: Say, limit_s: float = _LIMIT_S
) -> None:
    """Call what is to be told of a run's end; neither its failure nor its waiting changes how the run has ended.

    Args:
        on_end: "package.module:name", called with the content of result.json and the location of the run directory; or
            a command for /bin/sh, which has the first on its standard input, and in AREAL_RAY_STATUS and
            AREAL_RAY_RUN_DIRECTORY the status and the second. None: nobody is told.
        result: content of result.json.
        directory: location of the run directory.
        say: prints a line for the user.
        limit_s: longest wait; then a command is ended, and a function left alone.
    """
    if on_end is None:
        return
    work = _call if plugin.has_form(on_end) else _run
    try:
        work(on_end, dict(result), directory, limit_s)
    except Exception as error:  # noqa: BLE001  (the user's code; the run has ended, and that is what counts)
        say(f"on_end: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _call(name: str, result: dict[str, Any], directory: str, limit_s: float) -> None:
    failed: list[Exception] = []

    def call() -> None:
        try:
            plugin.factory(name, "on_end", {})(result, directory)
        except Exception as error:  # noqa: BLE001  (told by the other thread)
            failed.append(error)

    thread = threading.Thread(target=call, name="on_end", daemon=True)
    thread.start()
    thread.join(limit_s)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError(f"{name} has not returned after {limit_s:.0f} s")


def _run(command: str, result: dict[str, Any], directory: str, limit_s: float) -> None:
    about = {"AREAL_RAY_STATUS": str(result["status"]), "AREAL_RAY_RUN_DIRECTORY": directory}
    # In a session of its own, so that all of it can be ended, and a signal to the driver's group does not.
    with subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.PIPE, text=True, env=os.environ | about, start_new_session=True
    ) as process:
        try:
            process.communicate(json.dumps(result, indent=2) + "\n", limit_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"the command has not ended after {limit_s:.0f} s") from None
    if process.returncode:
        raise RuntimeError(f"the command ended with status {process.returncode}")

"""The process in which an export is made, from the side of who asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import areal_ray

_READ_S = 10.0  # for the last lines that an ended process has said


class ExportProcess:
    """Runs `areal_ray.tools.export` for one job at a time, until it is told to end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def run(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """What came of a job, with `error` if it failed; None if it was ended by `end`."""
        command = [sys.executable, "-m", "areal_ray.tools.export"]
        # A session of its own: Ctrl-C is for the driver. It ends with this process, by its input.
        self._process = process = subprocess.Popen(
            command,
            text=True,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if self._ended:
            process.kill()
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
        reading.start()
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        lines = process.stdout.readlines()  # until it ends
        with suppress(BrokenPipeError):
            process.stdin.close()
        status = process.wait()
        reading.join(_READ_S)
        self._process = None
        if self._ended and status != 0:
            return None
        try:
            answer: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            text = errors[-1].strip() if errors else "it said nothing"
            return {"error": f"the process ended with status {status}: {text[:500]}"}
        return answer

    def end(self) -> None:
        """Kill what is under way; a later job is not begun. From any thread."""
        self._ended = True
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()


def _environment() -> dict[str, str]:
    """That of this process, with this package, wherever it was imported from, and without GPUs."""
    root = str(Path(areal_ray.__file__).parents[1])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}

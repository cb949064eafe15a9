"""Runs as processes of their own on a head node, their workers, and waiting for what they write."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.ray.conftest import EXPERIMENT, ROOT, Run

_WAIT_S = 900.0  # on a busy machine, too
COMMAND = [sys.executable, "-m", "areal_ray.cli.main"]


class Process:
    """A command of `areal-ray` that runs, and what it prints.

    Args:
        environment: of the head node, see `tests.ray.head`.
        log: file for its output, to which is added.
        arguments: of `areal-ray`.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, *arguments: str) -> None:
        self.log = log
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                cwd=ROOT,
                env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, seen: Callable[[], object], what: str) -> None:
        """Look again and again until something is seen, or this process has ended without."""
        deadline = time.monotonic() + _WAIT_S
        while not seen():
            assert self.process.poll() is None or seen(), f"{what}: it has ended\n{self.text()}"
            assert time.monotonic() < deadline, f"{what}: not within {_WAIT_S:.0f} s\n{self.text()}"
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        status = self.process.wait(_WAIT_S)
        assert status == 0, f"status {status}\n{self.text()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def train(environment: Mapping[str, str], run: Run, *overrides: str) -> Process:
    """Start a run on the cluster of that environment."""
    arguments = ["train", "--config", EXPERIMENT, *run.arguments, *overrides]
    return Process(environment, run.path.parent / f"{run.path.name}.log", *arguments)


def seen_events(run: Run, kind: str) -> list[dict]:
    return run.events(kind) if (run.path / "events.jsonl").exists() else []


def kill_worker(run: Run) -> int:
    """SIGKILL the only worker of the newest attempt; its process id."""
    (pid,) = run.events("attempt")[-1]["pids"]
    os.kill(pid, 9)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    return int(pid)

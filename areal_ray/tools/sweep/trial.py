"""A trial of a sweep: a run of its own, driven by a process of its own, of which Ray Tune sees the metrics."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from ray import tune

from areal_ray.run import RunDir
from areal_ray.run.stop_request import ask_to_stop
from areal_ray.storage import storage_at

_LOOK_S = 0.5
_LEAVE_S = 600.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def train_command() -> list[str]:
    """The command that trains, without its arguments."""
    return [sys.executable, "-m", "areal_ray.cli.main", "train"]


def _stop_with_parent() -> None:
    """Have the new process told to save and leave when the trial is gone: the next one of the same run waits for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Trial(tune.Trainable):
    """A run under a name of its own. It resumes by that name, whatever happens to the sweep.

    One step, for Tune, is one evaluation of the run. Stopped early, the run saves first, and can be gone on with by
    hand: `areal-ray train ... run.name=NAME`.
    """

    def setup(self, config: dict[str, Any]) -> None:
        own = config["areal_ray"]
        self._metric, self._name = own["metric"], f"{own['name']}-{self.trial_id}"
        values = [f"{key}={value}" for key, value in config.items() if key != "areal_ray"]
        overrides = [*own["overrides"], *values, f"run.name={self._name}", f"run.storage_path={own['storage_path']}"]
        self._run = RunDir(storage_at(own["storage_path"]).sub(self._name))
        self._seen, self._evaluated = -1, dict[str, Any]()
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._log = open(f"{self.logdir}/run.log", "ab")  # noqa: SIM115  (of the process, as long as that lives)
        self._process = subprocess.Popen(
            [*train_command(), "--config", own["config"], *overrides],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=own["folder"],
            env={**os.environ, "RAY_ADDRESS": own["address"]},
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )

    def step(self) -> dict[str, Any]:
        while True:
            ended = self._process.poll()  # asked before: what it logs until then counts
            for line in self._run.metrics_after(self._seen) if self._run.exists() else ():
                self._seen = line["step"]
                if self._metric in line:
                    self._evaluated = {**line, "run": self._name}
                    return {**self._evaluated, "done": False}
            if ended is not None:
                if ended:
                    raise RuntimeError(f"run {self._name} ended with status {ended}; its output: {self._log.name}")
                return {**self._evaluated, "done": True}
            time.sleep(_LOOK_S)

    def cleanup(self) -> None:
        with suppress(ValueError, TimeoutError, OSError):  # it has just ended, or has not begun
            if self._process.poll() is None:
                ask_to_stop(self._run.storage)
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run has checkpoints of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the run goes on by its name."""

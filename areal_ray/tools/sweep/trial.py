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
from areal_ray.run.lease import wait_until_free
from areal_ray.run.stop_request import ask_to_stop
from areal_ray.storage import Storage, storage_at
from areal_ray.tools.sweep.draw import overrides
from areal_ray.tools.sweep.fork import fork

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
    """A run under the trial's name. It resumes by that name, whatever happens to the sweep.

    One step, for Tune, is one evaluation of the run. Stopped early, the run saves first, and can be gone on with by
    hand: `areal-ray train ... run.name=NAME`.

    What Tune keeps as a trial's checkpoint is the name of its run. With that of another trial's (as pbt gives it) this
    one goes on in a new run, NAME-g1 and so on, that begins with that run's checkpoint.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._own, trial = config["areal_ray"], config["trial"]
        self._metric, self._values = self._own["metric"], trial["values"]
        self._root = storage_at(self._own["storage_path"])
        self._process: subprocess.Popen[bytes] | None = None
        self._seen, self._evaluated = -1, dict[str, Any]()
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # With pbt these are values of another trial, of whose run `load_checkpoint` is told.
        self._take(trial["run"] if trial["name"] == self.trial_name else self.trial_name, trial["seen"])

    def step(self) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None
        while True:
            ended = self._process.poll()  # asked before: what it logs until then counts
            for line in self._run.metrics_after(self._seen) if self._run.exists() else ():
                self._seen = line["step"]
                if self._metric in line:
                    self._evaluated = {**line, "run": self._name}
                    return {**self._evaluated, "done": False}
            if ended is not None:
                if ended:
                    raise RuntimeError(f"run {self._name} ended with status {ended}; its output: {self._log_path}")
                return {**self._evaluated, "done": True}
            time.sleep(_LOOK_S)

    def cleanup(self) -> None:
        if self._process is None:
            return
        with suppress(ValueError, TimeoutError, OSError):  # it has just ended, or has not begun
            if self._process.poll() is None and not self._is_at_its_end():
                ask_to_stop(self._run.storage)
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Name the run: it has checkpoints of its own."""
        return {"trial": self.trial_name, "run": self._name, "seen": self._seen, "evaluated": self._evaluated}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on with a run by its name: with one of another trial in a new run that begins with its checkpoint."""
        assert checkpoint is not None
        if checkpoint["trial"] == self.trial_name:
            self._take(checkpoint["run"], checkpoint["seen"])
            return
        name = self._new_name()
        begun = fork(self._root.sub(checkpoint["run"]), self._root.sub(name), checkpoint["seen"])
        self._take(name, -1)
        self._evaluated = {**checkpoint["evaluated"], "run": name}
        with open(self._log_path, "a") as log:
            log.write(f"{name} begins with {begun} of {checkpoint['run']}\n")

    def _take(self, name: str, seen: int) -> None:
        """Make a run that of this trial; its evaluations until the step `seen` have been told."""
        self._name, self._run, self._seen = name, RunDir(self._storage_of(name)), seen
        told = [line for line in self._run.metrics() if line["step"] <= seen] if self._run.exists() else []
        judged = [line for line in told if self._metric in line]
        self._evaluated = {**judged[-1], "run": name} if judged else {"run": name}

    def _storage_of(self, name: str) -> Storage:
        return self._root.sub(name)

    @property
    def _log_path(self) -> str:
        return f"{self._own['sweep']}/{self._name}.log"

    def _new_name(self) -> str:
        number = 1
        while self._storage_of(f"{self.trial_name}-g{number}").names():
            number += 1
        return f"{self.trial_name}-g{number}"

    def _start(self) -> None:
        wait_until_free(self._run.storage)
        own = self._own
        typed = [*own["overrides"], *overrides(self._values)]
        typed += [f"run.name={self._name}", f"run.storage_path={own['storage_path']}"]
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*train_command(), "--config", own["config"], *typed],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=own["folder"],
                env={**os.environ, "RAY_ADDRESS": own["address"]},
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )

    def _is_at_its_end(self) -> bool:
        """Whether the last step is behind it, so that it only has to finish."""
        submitted = self._run.newest("submitted")
        return submitted is not None and self._seen >= submitted["last_step"]

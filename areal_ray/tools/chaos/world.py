"""The run that `areal-ray chaos` disturbs, on nodes of its own, and everything around it that can be broken."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from areal_ray.checkpoint import Catalog
from areal_ray.config import Config
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage, Storage, storage_at

_LOOK_S, _LOOK_FAR_S = 0.01, 0.1  # between two looks; into a bucket each is a request, which the run's own wait for
BACK_S = 300.0  # a run that has not gone on by then has not survived


class NotSurvived(RuntimeError):
    """The run did not come back; says after what."""


class World:
    """The run, and everything around it that can be broken.

    Args:
        path, overrides: the experiment.
        folder: for the runs and their logs.
        config: the same, loaded.
        storage_process: id of the storage server's process on this machine, if it may be stopped for a while.
        disk: where a small disk is mounted that the run lies on, if it may be filled.
    """

    def __init__(
        self,
        path: str,
        overrides: Sequence[str],
        folder: Path,
        config: Config,
        storage_process: int | None,
        disk: Path | None,
    ) -> None:
        self._command = [sys.executable, "-m", "areal_ray.cli.main", "train", "--config", path, *overrides]
        self._folder, self.storage_process, self.disk = folder, storage_process, disk
        self.storage: Storage = storage_at(config.run.storage_path, vars(config.run.s3)).sub(config.run.name)
        self.run, self.catalog = RunDir(self.storage), Catalog(self.storage)
        self._look_s = _LOOK_S if isinstance(self.storage, LocalStorage) else _LOOK_FAR_S
        self._workers = config.usable_sizes[-1]
        self.driver: subprocess.Popen[bytes] | None = None
        self.damaged: set[str] = set()  # checkpoints
        self.hits = 0  # processes that were killed or stopped
        self.seen: dict[str, float] = {}  # committed checkpoints, by name: when they were first seen
        self._ended = threading.Event()

    def __enter__(self) -> World:
        logging.getLogger("ray").setLevel(logging.ERROR)
        here = max(1, self._workers // 2)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": here, "include_dashboard": False})
        self._second = self.cluster.add_node(num_cpus=self._workers - here) if self._workers > here else None
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()

    @property
    def log(self) -> Path:
        return self._folder / "chaos.log"

    def start_driver(self) -> None:
        # The nodes ask for a token only if this process was told so.
        auth = os.environ.get("RAY_AUTH_MODE", "disabled")
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_AUTH_MODE": auth}
        with open(self.log, "ab") as output:
            self.driver = subprocess.Popen(self._command, stdout=output, stderr=output, env=environment)

    def restart_driver(self) -> None:
        assert self.driver is not None
        self.hits += 1
        self.driver.kill()
        self.driver.wait()
        self.start_driver()

    def workers(self) -> list[int]:
        """Process ids of the newest attempt's ranks."""
        return list(self.run.events("attempt")[-1]["pids"])

    def processes(self, title: str) -> set[int]:
        """Processes of this world's nodes, by the beginning of their title."""
        found = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.add(process.pid)
        return found

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of Ray's processes, if it is still that; `hits` counts those that were."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if " ".join(process.cmdline()).startswith("ray::"):
                process.send_signal(number)
                self.hits += 1

    def count(self, kind: str) -> int:
        return len(self.run.events(kind))

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Wait for it; NotSurvived if it does not come."""
        began = time.monotonic()
        while not (value := condition()):
            if time.monotonic() - began > BACK_S:
                raise NotSurvived(f"waited {BACK_S:.0f} s for {what}; see {self.log}")
            if self.driver is not None and self.driver.poll() is not None:
                raise NotSurvived(f"the driver ended with status {self.driver.returncode}; see {self.log}")
            time.sleep(self._look_s)
        return value

    def change_node(self) -> None:
        """Take the second node away, with what runs on it, and bring another one."""
        assert self._second is not None
        self.hits += 1
        self.cluster.remove_node(self._second, allow_graceful=False)
        self._second = self.cluster.add_node(num_cpus=self._workers - max(1, self._workers // 2))

    def newest(self) -> str | None:
        return self.catalog.last_committed()

    def _watch(self) -> None:
        # The ledger does not know a checkpoint whose rank 0 was killed between the commit and the line about it.
        while not self._ended.wait(self._look_s):
            with suppress(OSError):
                newest = self.newest()
                if newest is not None:
                    self.seen.setdefault(newest, time.time())


def run_undisturbed(path: str, overrides: Sequence[str], log: Path) -> None:
    """Train on a cluster of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "areal_ray.cli.main", "train", "--config", path, *overrides]
    with open(log, "ab") as output:
        status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if status:
        raise NotSurvived(f"the undisturbed run ended with status {status}; see {log}")

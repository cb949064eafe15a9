"""The run that `areal-ray chaos` disturbs, on nodes of its own, and everything around it that can be broken."""

from __future__ import annotations

import logging
import os
import signal
import socket
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
        self.driver: subprocess.Popen[Any] | None = None
        self._drivers: list[subprocess.Popen[Any]] = []  # all that were started
        self.refuse: Path | None = None  # see `unreadable`
        self.damaged: set[str] = set()  # checkpoints
        self.hits, self.hit_at = 0, 0.0  # how often something was done to the run, and when it was done last
        self.seen: dict[str, float] = {}  # committed checkpoints, by name: when they were first seen
        self.kept_open: list[socket.socket] = []  # names that are taken from the run
        self._ended = threading.Event()

    def __enter__(self) -> World:
        logging.getLogger("ray").setLevel(logging.ERROR)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup, and the driver would ignore it, too
            signal.signal(signal.SIGHUP, lambda *_: None)  # a handler is not handed on
        self._start_cluster()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        self._end_cluster()
        for each in self.kept_open:
            each.close()

    def _start_cluster(self) -> None:
        here = max(1, self._workers // 2)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": here, "include_dashboard": False})
        self._second = self.cluster.add_node(num_cpus=self._workers - here) if self._workers > here else None

    def _end_cluster(self) -> None:
        self.cluster.shutdown()

    def change_cluster(self) -> None:
        """Take all nodes away, and bring others."""
        self._end_cluster()
        self._start_cluster()

    @property
    def log(self) -> Path:
        return self._folder / "chaos.log"

    def start_driver(self) -> None:
        # The nodes ask for a token only if this process was told so.
        auth = os.environ.get("RAY_AUTH_MODE", "disabled")
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address, "RAY_AUTH_MODE": auth}
        with open(self.log, "ab") as output:
            self.driver = subprocess.Popen(
                self._command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self._drivers.append(self.driver)

    def end_driver(self) -> int:
        """Ask the driver to save and to end; its exit status."""
        assert self.driver is not None
        self.driver.terminate()
        return self.await_end(self.driver)

    def await_end(self, driver: subprocess.Popen[Any]) -> int:
        """Wait for the end of a driver; its exit status. NotSurvived if it does not end."""
        try:
            return driver.wait(timeout=BACK_S)
        except subprocess.TimeoutExpired:
            raise NotSurvived(f"waited {BACK_S:.0f} s for the driver to end; see {self.log}") from None

    def restart_driver(self) -> None:
        assert self.driver is not None
        self.hit()
        self.driver.kill()
        self.driver.wait()
        self.start_driver()

    def hit(self) -> None:
        """Note that a process was killed or stopped, or something taken from it."""
        self.hits, self.hit_at = self.hits + 1, time.time()

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

    def helpers(self, script: str) -> set[int]:
        """Processes of this package's own, by a word of their command, that belong to this world's run.

        The first process ids among their arguments are whom they serve: the driver, a worker or a node.
        """
        # A keeper of memory is no child of the worker that it serves.
        mine = {str(pid) for pid in self.descendants()}
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            at = next((number for number, word in enumerate(command) if script in word), None)
            if at is not None and (mine & set(command[at + 1 : at + 3]) or str(process.pid) in mine):
                found.add(process.pid)
        return found

    def descendants(self) -> set[int]:
        return {process.pid for process in psutil.Process().children(recursive=True)}

    def keepers(self) -> set[int]:
        return self.helpers("areal_ray.processes.memory_keeper")

    def file_writers(self) -> set[int]:
        return self.helpers("areal_ray.processes.file_writer")

    def fork_servers(self) -> set[int]:
        return self.helpers("fork_server_main.py")

    def drivers(self) -> set[int]:
        return {self.driver.pid} if self.driver is not None else set()

    def controllers(self) -> set[int]:
        return self.processes("ray::Controller")

    def gcs(self) -> set[int]:
        return {each.process.pid for each in self.cluster.head_node.all_processes["gcs_server"]}

    def raylet(self) -> set[int]:
        """The second node's own process."""
        assert self._second is not None
        return {each.process.pid for each in self._second.all_processes["raylet"]}

    def agent(self) -> set[int]:
        """What Ray's dashboard has on the second node; the node's own process ends with it."""
        (raylet,) = self.raylet()
        children = psutil.Process(raylet).children()
        return {each.pid for each in children if "DashboardAgent" in " ".join(each.cmdline())}

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process, if it is there; noted by `hit`."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)
            self.hit()

    def send_to_group(self, number: signal.Signals) -> None:
        """Send a signal to the driver's process group."""
        assert self.driver is not None
        os.killpg(self.driver.pid, number)
        self.hit()

    def troubles(self) -> int:
        """Saves that have failed, and troubles of the controller."""
        return self.count("save_failed") + self.count("controller_trouble")

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of Ray's processes, if it is still that; noted by `hit`."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if " ".join(process.cmdline()).startswith("ray::"):
                process.send_signal(number)
                self.hit()

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
        self.hit()
        self.cluster.remove_node(self._second, allow_graceful=False)
        self._second = self.cluster.add_node(num_cpus=self._workers - max(1, self._workers // 2))

    def newest(self) -> str | None:
        return self.catalog.last_committed()

    def _watch(self) -> None:
        # The ledger does not know a checkpoint whose rank 0 was killed between the commit and the line about it.
        while not self._ended.wait(self._look_s):
            self._look()

    def _look(self) -> None:
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

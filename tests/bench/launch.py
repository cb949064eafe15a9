"""Starting clusters and arms as processes, looking at them through their step logs, and ending what was started."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .peers.common import read_log

ROOT = Path(__file__).parents[2]
_LOOK_S = 0.1  # coarse: times are read from the logs, and looking takes the arms' time
_ANSWER_S = 120.0  # to start some nodes, or to remove one


def environment(**more: str) -> dict[str, str]:
    """The same for every arm: one thread a worker, no niceness, the code of this checkout."""
    same = {
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return inherited | same | more


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL these, and wait until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def tree(pid: int) -> list[psutil.Process]:
    """The process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return dict(process.environ())
    return {}


def title(process: psutil.Process) -> str:
    """What Ray calls a process of its own; "" of one that has ended."""
    with suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""


class Cluster:
    """Ray nodes on this machine, ended with the block.

    Args:
        cpus: of each node, the head first.
    """

    def __init__(self, *cpus: int) -> None:
        self._cpus = cpus

    def __enter__(self) -> Cluster:
        self._folder = Path(tempfile.mkdtemp(prefix="areal_ray-cluster-"))
        self._log = open(self._folder / "log", "w+")
        # Ray's own session stays where it would be: its sockets' paths must be short.
        more = {"TMPDIR": str(self._folder), "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", tempfile.gettempdir())}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.cluster_process", *map(str, self._cpus)],
            cwd=ROOT,
            env=environment(**more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.address = self._answer("address").split()[1]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        processes = self.processes()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        end(processes)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """All that it has started, and what its nodes' processes have put aside, such as fork servers."""
        own = tree(self._process.pid)
        pids = {str(process.pid) for process in own}
        aside = [each for each in psutil.process_iter() if _environment(each).get("RAY_RAYLET_PID") in pids]
        return list(dict.fromkeys([*own, *aside]))

    def remove_node(self) -> None:
        """SIGKILL the last node and whatever runs on it; returns when it is gone."""
        self._process.stdin.write("remove\n")
        self._process.stdin.flush()
        self._answer("removed")

    def replace_node(self, worker: int) -> None:
        """SIGKILL the node on which a process runs, with whatever runs there, and add one like it."""
        self._process.stdin.write(f"replace {worker}\n")
        self._process.stdin.flush()
        self._answer("replaced")

    def _answer(self, begins: str) -> str:
        deadline, line = time.monotonic() + _ANSWER_S, ""
        with suppress(queue.Empty):
            while (line := self._lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                if line.startswith(begins):
                    return line
        what = "the cluster ended" if line is None else f"the cluster did not say {begins!r} in {_ANSWER_S:.0f} s"
        self._log.seek(0)
        raise RuntimeError(f"{what}: {self._log.read()[-2000:]}")

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


class Job:
    """A command that trains, in a session of its own.

    Args:
        command: to run in the root of the checkout.
        folder: of the run, with `log` in it; what the command prints goes to `output`, temporary files to `tmp`.
        more: environment variables.
    """

    def __init__(self, command: list[str], folder: Path, more: dict[str, str]) -> None:
        self.folder = folder
        self.cluster: Cluster | None = None  # its own, if it has one
        (folder / "tmp").mkdir()
        more = {"TMPDIR": str(folder / "tmp"), **more}
        self._output = open(folder / "output", "w+")  # noqa: SIM115  (closed by stop)
        self.began = time.time()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**more), stdout=self._output, stderr=subprocess.STDOUT
        )

    def events(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """Lines of a rank's step log of one kind: start, settings, step, saved."""
        return [line for line in read_log(self.folder / "log", rank) if line["event"] == kind]

    def wait(
        self, condition: Callable[[], Any], limit_s: float = 180.0, look_s: float = _LOOK_S, what: str = "nothing"
    ) -> Any:
        """Wait until the condition holds; its value.

        Args:
            condition: looked at every look_s seconds, for limit_s seconds.
            what: there is if it does not hold by then.

        Raises:
            RuntimeError: with the end of what the job printed, if it ends before, or if that takes too long.
        """
        deadline = time.monotonic() + limit_s
        while not (found := condition()):
            ended = self.process.poll()
            if ended is not None and not (found := condition()):
                raise RuntimeError(f"ended with {ended}:\n{self.printed()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} after {limit_s:.0f} s:\n{self.printed()}")
            time.sleep(look_s)
        return found

    def wait_for_end(self, limit_s: float = 600.0) -> None:
        self.wait(lambda: self.process.poll() is not None, limit_s)
        if self.process.returncode:
            raise RuntimeError(f"ended with {self.process.returncode}:\n{self.printed()}")

    def step_after(self, before: dict[str, Any]) -> dict[str, Any] | None:
        """The first step that other processes than that of `before` have finished, if any."""
        later = [line for line in self.events("step") if line["time"] > before["time"]]
        return next((line for line in later if line["pid"] != before["pid"]), None)

    def processes(self) -> list[psutil.Process]:
        """All that there are of it, those of a cluster of its own too."""
        cluster = self.cluster.processes() if self.cluster else []
        return list(dict.fromkeys([*tree(self.process.pid), *cluster]))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As long as the block lasts nothing of it runs.

        Raises:
            RuntimeError: if a rank would run on.
        """
        stopped = self.processes()
        there = {process.pid for process in stopped}
        for path in (self.folder / "log").glob("*.jsonl"):
            pid = read_log(path.parent, int(path.stem.split("-")[1]))[-1]["pid"]
            if pid not in there and psutil.pid_exists(pid):  # one that was killed does not
                raise RuntimeError(f"process {pid}, which trains, is none of the {len(there)} that were started")
        try:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def printed(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """End it as it stands: the command, its descendants, and those that wrote its step logs."""
        processes = tree(self.process.pid)
        for path in (self.folder / "log").glob("*.jsonl"):
            for line in read_log(path.parent, int(path.stem.split("-")[1])):
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(line["pid"])
                    if abs(process.create_time() - line["time"]) < 1e6 and process.create_time() <= line["time"]:
                        processes.append(process)
        end(list(dict.fromkeys(processes)))
        self.process.wait()
        self._output.close()


def kill(pid: int, number: int = signal.SIGKILL) -> float:
    """Send a signal; the time."""
    now = time.time()
    os.kill(pid, number)
    return now


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder of its own for one run, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="areal_ray-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

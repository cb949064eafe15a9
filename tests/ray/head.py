"""`ray start --head` on ports of its own, ended by process id."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Head:
    """A head node.

    Args:
        process: of `ray start`.
        environment: in which commands reach it, by job submission or as drivers.
    """

    def __init__(self, process: subprocess.Popen, environment: dict[str, str]) -> None:
        self.process, self.environment = process, environment

    def family(self) -> list[psutil.Process]:
        """All of its processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            return [*started.children(recursive=True), started]
        return []

    def component(self, name: str) -> psutil.Process:
        """gcs_server or raylet."""
        (found,) = (process for process in self.family() if process.name() == name)
        return found


@contextlib.contextmanager
def started_head() -> Iterator[Head]:
    gcs, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ar", dir="/tmp"))  # short: socket paths have a limit of 107 bytes
    bin_folder = Path(sys.executable).parent
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{bin_folder}:{env['PATH']}", "RAY_worker_niceness": "0"}
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            [
                *(bin_folder / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
                *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
                *(f"--ray-client-server-port={client}", f"--temp-dir={folder / 'ray'}"),
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    api = f"http://127.0.0.1:{dashboard}"
    head = Head(process, env | {"RAY_API_SERVER_ADDRESS": api, "RAY_ADDRESS": f"127.0.0.1:{gcs}"})
    everything = {}
    try:
        _wait_for(api, process, folder / "head.log")
        everything = {member.pid: member for member in head.family()}
        yield head
    except Exception as error:
        error.add_note(f"the head node: {(folder / 'head.log').read_text()[-2000:]}")
        raise
    finally:
        # Its own children are somebody else's once it is gone.
        family = list((everything | {member.pid: member for member in head.family()}).values())
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=2):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)  # between two questions, not a guess of how long it takes

"""A real `ray job submit` to a head node of the test's own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from areal_ray import ckpt
from areal_ray.storage import LocalStorage

from .conftest import EXPERIMENT, ROOT, Run

pytestmark = pytest.mark.ray


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """`ray start --head`; the environment that reaches it."""
    gcs, dashboard, agent, client = _free_ports(4)
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
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address, process, folder / "head.log")
        yield env | {"RAY_API_SERVER_ADDRESS": address}
    finally:
        started = psutil.Process(process.pid)
        family = [*started.children(recursive=True), started]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address, process, log):
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=2):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)  # between two questions, not a guess of how long it takes


def test_submitted_job_gives_the_same_checkpoint(head, undisturbed, tmp_path):
    run = Run(tmp_path, "submitted")
    command = [sys.executable, "-m", "areal_ray.cli", "submit", "--config", os.path.relpath(EXPERIMENT, ROOT)]
    fault = "faults=[{kind: sigkill, rank: 1, step: 6}]"
    done = subprocess.run([*command, *run.arguments, fault], cwd=ROOT, env=head, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: step 12" in done.stdout
    assert (
        ckpt.differences(
            LocalStorage(run.path / run.result()["checkpoint"]),
            LocalStorage(undisturbed.path / undisturbed.result()["checkpoint"]),
        )
        == []
    )
    assert run.result()["restarts"] == 1


def test_a_config_error_is_found_before_anything_is_uploaded(head):
    command = [sys.executable, "-m", "areal_ray.cli", "submit", "--config", EXPERIMENT, "train.step=3"]
    done = subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "config error: command line: train.step: no such key; did you mean 'steps'?\n"


def test_no_cluster_says_how_to_start_one():
    (port,) = _free_ports(1)
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "areal_ray.cli", "submit", "--config", EXPERIMENT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr

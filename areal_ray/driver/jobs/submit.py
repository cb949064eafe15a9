"""Submits an experiment to a running cluster, follows its output, asks after it, stops it."""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientError

from areal_ray.config import Config, config_hash
from areal_ray.driver.jobs.server import Jobs
from areal_ray.driver.jobs.upload import upload

_STOP_S = 600.0
_INTERRUPTED = 130
_AWAY_S = 120.0
_LOOK_S = 2.0


def submit(
    config: Config,
    path: str,
    overrides: Sequence[str],
    address: str | None = None,
    wait: bool = True,
    retries: int = 0,
) -> int:
    """Uploads the current folder, trains on the cluster and shows the output.

    Args:
        config: as loaded, for the run's name and place.
        path: the experiment's file.
        overrides: key=value strings.
        address: the dashboard's URL, see `Jobs`.
        wait: until the job ends; else it is only submitted.
        retries: how often a job that has died, of which the run knows nothing, is submitted again while this waits. One
            that has ended with a status of its own is not: the run has failed for good, or was stopped.

    Returns:
        The exit status of the last job.

    Raises:
        NoCluster: if no cluster answers.
        ConfigError: if the folder is too large.
        ValueError: if the run runs already.
    """
    jobs = Jobs(address)
    for name in list(logging.Logger.manager.loggerDict):  # Ray logs every file that it does not upload, three times
        if name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)
    metadata = {"run": config.run.name, "storage_path": config.run.storage_path, "config_hash": config_hash(config)}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    name, metadata["revision"] = config.run.name, git.stdout.strip() or "unknown"
    where = f" --address {address}" if address else ""
    with upload(path, overrides) as taken:
        own = Path("jobs/train.py").is_file() and Path("areal_ray").is_dir()  # this repository: its code comes along
        train = ["python", "jobs/train.py"] if own else ["python", "-m", "areal_ray.cli.main", "train"]
        command = shlex.join([*train, "--config", taken.config, *taken.overrides])
        tried = 0
        while True:
            job = jobs.submit(name, command, str(taken.folder), metadata)
            print(f"job {job} on {jobs.address}\nstop it with: areal-ray stop {name}{where}", flush=True)
            if not wait:
                print(f"its output: areal-ray logs -f {name}{where}")
                return 0
            status, death = _watch(jobs, job, name)
            if not death or tried == retries:
                return status
            tried += 1
            print(f"submitting it again, retry {tried} of {retries}", flush=True)


def _death(job: Any) -> str:
    """How a job's driver, or the node that it was on, was ended by others; empty if it has ended by itself."""
    status = job.driver_exit_code
    if job.status.name != "FAILED" or (status is not None and (0 <= status <= 128 or status == _INTERRUPTED)):
        return ""
    if status is None:
        return " ".join(str(job.message or "nobody knows how").split())[:200]
    number = -status if status < 0 else status - 128
    try:
        return f"its driver was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"its driver has left with status {status}"


def follow(jobs: Jobs, job: str, name: str) -> int:
    """Show a job's output until it ends; its exit status."""
    return _watch(jobs, job, name)[0]


class _Lost(Exception):
    """A job of which nothing is heard any more; the message says why.

    Args:
        replaced: whether the job server answers, and has no such job: the cluster is another one.
    """

    def __init__(self, message: str, replaced: bool) -> None:
        super().__init__(message)
        self.replaced = replaced


def _watch(jobs: Jobs, job: str, name: str) -> tuple[int, str]:
    """Show a job's output until it ends: its exit status, and how it has died; "" if it has ended by itself."""
    try:
        # If the stream of its log breaks off, it is asked below what has become of it.
        with suppress(OSError, RuntimeError, ClientError):
            asyncio.run(_show(jobs.client, job))
        while not (info := _info(jobs, job)).status.is_terminal():
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on: areal-ray logs -f {name}, areal-ray stop {name}", flush=True)
        return _INTERRUPTED, ""
    except _Lost as lost:
        print(f"job {job}: {lost}", file=sys.stderr, flush=True)
        return 1, str(lost) if lost.replaced else ""
    if info.status.name == "SUCCEEDED":
        return 0, ""
    status, death = info.driver_exit_code or 1, _death(info)
    if status != _INTERRUPTED:  # asked to stop, which it has said itself
        print(f"job {job}: {death or info.status.value.lower()}", file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status, death  # as a shell has it for a signal


def _info(jobs: Jobs, job: str) -> Any:
    """What the job server knows of a job; it may be away for a while, as when the head node starts again (_Lost)."""
    deadline = time.monotonic() + _AWAY_S
    while True:
        try:
            return jobs.client.get_job_info(job)
        except (OSError, RuntimeError) as error:
            if "does not exist" in str(error):
                raise _Lost(f"{jobs.address} does not know it any more: its cluster is gone", True) from None
            if time.monotonic() > deadline:
                text = f"{jobs.address} has not answered for {_AWAY_S:.0f} s; it may go on there"
                raise _Lost(text, False) from None
            time.sleep(_LOOK_S)


async def _show(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def stop(run: str, address: str | None = None, wait_s: float = _STOP_S) -> int:
    """Have a submitted run save and leave, and wait for it.

    Ray itself gives a job three seconds before it kills it. So the run is asked in its own directory, by a small job
    that sees what the run sees.

    Returns:
        0 when it has ended; 1 when it has not in this time.

    Raises:
        NoCluster, ValueError: as `Jobs` does.
    """
    jobs = Jobs(address)
    job = jobs.newest(run)
    if job.status.is_terminal():
        print(f"{run} does not run: job {job.submission_id} {job.status.value.lower()}")
        return 0
    facts = job.metadata or {}
    if not {"run", "storage_path"} <= facts.keys():
        raise ValueError(f"{run} was not submitted by areal-ray submit: see areal-ray stop --directory")
    name, place = facts["run"], facts["storage_path"]
    ask = shlex.join(["python", "-m", "areal_ray.cli.main", "stop", "--directory", f"{place.rstrip('/')}/{name}"])
    env = {"working_dir": job.runtime_env["working_dir"]} if "working_dir" in (job.runtime_env or {}) else {}
    asking = jobs.client.submit_job(entrypoint=ask, runtime_env=env, metadata={"stops": name})
    print(f"asked {name} (job {job.submission_id}) to save and leave", flush=True)
    try:
        return _await_stop(jobs, job.submission_id, asking, name, wait_s)
    except _Lost as lost:
        print(f"job {job.submission_id}: {lost}", file=sys.stderr)
        return 1


def _await_stop(jobs: Jobs, job: str, asking: str, name: str, wait_s: float) -> int:
    """Wait until a job has left that another one, `asking`, asks to; the exit status of `stop`. _Lost as `_info`."""
    began = time.monotonic()
    while time.monotonic() - began < wait_s:
        if _info(jobs, asking).status.name == "FAILED":
            print(f"it could not be asked: {_logs(jobs, asking)[-500:]}", file=sys.stderr)
            return 1
        if _info(jobs, job).status.is_terminal():
            print("\n".join(_logs(jobs, job).splitlines()[-1:]))
            return 0
        time.sleep(0.5)
    print(f"{name} has not left within {wait_s:.0f} s; it still tries to", file=sys.stderr)
    return 1


def _logs(jobs: Jobs, job: str) -> str:
    """What a job has printed; empty if the job server is away just now."""
    with suppress(OSError, RuntimeError):
        return str(jobs.client.get_job_logs(job)).strip()
    return ""

"""Submits an experiment to a running cluster, follows its output, asks after it, stops it."""

from __future__ import annotations

import asyncio
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_ray.config import Config, config_hash
from areal_ray.driver.jobs.server import Jobs
from areal_ray.driver.jobs.upload import upload

_STOP_S = 600.0


def submit(config: Config, path: str, overrides: Sequence[str], address: str | None = None, wait: bool = True) -> int:
    """Uploads the current folder, trains on the cluster and shows the output.

    Args:
        config: as loaded, for the run's name and place.
        path: the experiment's file.
        overrides: key=value strings.
        address: the dashboard's URL, see `Jobs`.
        wait: until the job ends; else it is only submitted.

    Returns:
        The job's exit status.

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
    with upload(path, overrides) as taken:
        own = Path("jobs/train.py").is_file() and Path("areal_ray").is_dir()  # this repository: its code comes along
        train = ["python", "jobs/train.py"] if own else ["python", "-m", "areal_ray.cli.main", "train"]
        command = shlex.join([*train, "--config", taken.config, *taken.overrides])
        job = jobs.submit(
            config.run.name, command, str(taken.folder), {**metadata, "revision": git.stdout.strip() or "unknown"}
        )
    name = config.run.name
    where = f" --address {address}" if address else ""
    print(f"job {job} on {jobs.address}\nstop it with: areal-ray stop {name}{where}", flush=True)
    if not wait:
        print(f"its output: areal-ray logs -f {name}{where}")
        return 0
    return follow(jobs, job, name)


def follow(jobs: Jobs, job: str, name: str) -> int:
    """Show a job's output until it ends; its exit status."""
    try:
        asyncio.run(_show(jobs.client, job))
        while not (info := jobs.client.get_job_info(job)).status.is_terminal():  # the stream of its log broke off
            time.sleep(2)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on: areal-ray logs -f {name}, areal-ray stop {name}", flush=True)
        return 130
    if info.status.name == "SUCCEEDED":
        return 0
    if info.driver_exit_code != 130:  # asked to stop, which it has said itself
        print(f"job {job}: {info.status.value.lower()}", file=sys.stderr)
    return info.driver_exit_code or 1


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
    began = time.monotonic()
    while time.monotonic() - began < wait_s:
        asked = jobs.client.get_job_info(asking)
        if asked.status.name == "FAILED":
            print(f"it could not be asked: {jobs.client.get_job_logs(asking).strip()[-500:]}", file=sys.stderr)
            return 1
        info = jobs.client.get_job_info(job.submission_id)
        if info.status.is_terminal():
            lines = jobs.client.get_job_logs(job.submission_id).strip().splitlines()
            print("\n".join(lines[-1:]))
            return 0
        time.sleep(0.5)
    print(f"{name} has not left within {wait_s:.0f} s; it still tries to", file=sys.stderr)
    return 1

"""Submits an experiment to a running cluster and follows its output."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_ray.driver.connect import use_token

_NO_CLUSTER = """no Ray cluster answers at {address}
start one:        . .venv/bin/activate && ray start --head
or name another:  export RAY_API_SERVER_ADDRESS=http://HEAD:8265
"""


def submit(config: str, overrides: Sequence[str], address: str | None = None) -> int:
    """Uploads the current folder, runs jobs/train.py on the cluster and shows its output.

    Args:
        config: an experiment's file, below the current folder.
        overrides: key=value strings.
        address: the dashboard's URL; default RAY_API_SERVER_ADDRESS, then this machine.

    Returns:
        The job's exit status; 1 if no cluster answers, 2 without jobs/train.py in the current folder.
    """
    use_token()
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    if not Path("jobs/train.py").is_file():
        print("submit from the folder that has jobs/train.py: it is what is uploaded", file=sys.stderr)
        return 2
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError):
        print(_NO_CLUSTER.format(address=address), end="", file=sys.stderr)
        return 1
    entrypoint = shlex.join(["python", "jobs/train.py", "--config", config, *overrides])
    for name in list(logging.Logger.manager.loggerDict):  # Ray logs every file that it does not upload, three times
        if name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": "."})
    print(f"job {job} on {address}\nstop it with: ray job stop {job} --address {address}", flush=True)
    asyncio.run(_follow(client, job))
    while not (info := client.get_job_info(job)).status.is_terminal():  # the stream of its log broke off
        time.sleep(2)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"job {job}: {info.status.value.lower()}", file=sys.stderr)
    return info.driver_exit_code or 1


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)

"""Submitted jobs of a run, asked of the cluster's job server: by the run's name or a job's id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from areal_ray.driver.connect import WRONG_TOKEN, use_token

NO_CLUSTER = """no Ray cluster answers at {address}
start one:        . .venv/bin/activate && ray start --head
or name another:  export RAY_API_SERVER_ADDRESS=http://HEAD:8265
"""


class NoCluster(Exception):
    """No job server answers; the message says what to do."""


class Jobs:
    """The job server of a cluster.

    Args:
        address: the dashboard's URL; default RAY_API_SERVER_ADDRESS, then this machine. RAY_JOB_HEADERS (JSON) is sent
            with every request, as Ray's own client does.

    Raises:
        NoCluster: if nobody answers there, or not to this token.
    """

    def __init__(self, address: str | None = None) -> None:
        use_token()
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        headers = os.environ.get("RAY_JOB_HEADERS")
        try:
            self.client: Any = JobSubmissionClient(self.address, headers=json.loads(headers) if headers else None)
        except (ConnectionError, RuntimeError):
            raise NoCluster(NO_CLUSTER.format(address=self.address)) from None
        except AuthenticationError:
            raise NoCluster(f"{self.address}: {WRONG_TOKEN}\n") from None

    def all(self) -> list[Any]:
        """All jobs (ConnectionError if the server has none to tell of, as while a head node starts)."""
        try:
            return list(self.client.list_jobs())
        except RuntimeError as error:
            text = f"{self.address} does not say which jobs it has: {' '.join(str(error).split())[:300]}"
            raise ConnectionError(text) from None

    def of(self, run: str) -> list[Any]:
        """The jobs of a run, by its name, or the one with that id; oldest first."""
        details = [each for each in self.all() if each.submission_id]
        found = [each for each in details if run in (each.submission_id, (each.metadata or {}).get("run"))]
        return sorted(found, key=lambda each: each.start_time or 0)

    def newest(self, run: str) -> Any:
        """The newest job of a run.

        Raises:
            ValueError: if there is none.
        """
        found = self.of(run)
        if not found:
            known = sorted({each.metadata["run"] for each in self.all() if "run" in (each.metadata or {})})
            there = f"; there are: {', '.join(known)}" if known else ""
            raise ValueError(f"no job of a run {run!r} on {self.address}{there}")
        return found[-1]

    def submit(self, run: str, command: str, folder: str, metadata: Mapping[str, str]) -> str:
        """Start a job of a run; its id, which has the run's name in it.

        Raises:
            ValueError: if one runs already.
        """
        before = self.of(run)
        if busy := [each for each in before if not each.status.is_terminal()]:
            raise ValueError(
                f"{run} runs already, as job {busy[-1].submission_id} on {self.address}: look at it with "
                f"areal-ray status {run}, stop it with areal-ray stop {run}"
            )
        prefix = re.sub(r"[^A-Za-z0-9_.-]", "-", run)
        ids = [each.submission_id or "" for each in self.all()]
        numbers = [int(found[1]) for each in ids if (found := re.fullmatch(rf"{re.escape(prefix)}-(\d+)", each))]
        # A number that no earlier job has: two that are submitted at the same time get the same, and one is refused.
        job = f"{prefix}-{max(numbers, default=0) + 1}"
        try:
            submitted: str = self.client.submit_job(
                entrypoint=command, submission_id=job, runtime_env={"working_dir": folder}, metadata=dict(metadata)
            )
        except OSError:
            text = f"the job server at {self.address} does not answer any more; areal-ray status {run} says if it runs"
            raise ConnectionError(text) from None
        except RuntimeError as error:
            raise ValueError(f"{self.address} refuses job {job}: {' '.join(str(error).split())[:300]}") from None
        return submitted

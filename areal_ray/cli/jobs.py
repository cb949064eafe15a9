"""areal-ray submit, status, logs, stop: runs on a cluster, from a laptop."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


def add_jobs(commands: Any) -> None:
    """Add the commands about submitted jobs, but `submit`, to those of `areal-ray`."""
    for name, run, text in (
        ("status", _status, "what has become of a submitted run"),
        ("logs", _logs, "the output of a submitted run"),
        ("stop", _stop, "have a run save and leave, and wait for it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_address(command)
        if run is _stop:
            command.add_argument("run_name", metavar="RUN", nargs="?", help="its name, or the id of its job")
            command.add_argument("--directory", metavar="DIR", help="instead: a run directory that is seen from here")
        else:
            command.add_argument("run_name", metavar="RUN", help="its name, or the id of its job")
        if run is _logs:
            command.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
        command.set_defaults(run=lambda arguments, run=run: _ask(run, arguments))


def add_address(parser: argparse.ArgumentParser) -> None:
    text = "of the dashboard; default RAY_API_SERVER_ADDRESS, then http://127.0.0.1:8265"
    parser.add_argument("--address", metavar="URL", help=text)


def _ask(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    from areal_ray.driver.jobs.server import NoCluster

    try:
        return run(arguments)
    except NoCluster as error:
        print(error, end="", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"areal-ray: {error}", file=sys.stderr)
        return 1


def submit(config: Any, arguments: argparse.Namespace) -> int:
    """Submit an experiment.

    Raises:
        ConfigError: if it cannot be submitted like that.
    """
    from areal_ray.config import ConfigError
    from areal_ray.driver.jobs.server import NoCluster
    from areal_ray.driver.jobs.submit import submit

    refuse_secrets(arguments.overrides)
    wait, retries = not arguments.detach, arguments.retries
    if retries < 0 or (retries and not wait):
        text = "is 0 or more" if retries < 0 else "takes this command to wait, which --detach does not"
        raise ConfigError("--retries", text, "command line")
    try:
        return submit(config, arguments.config, arguments.overrides, arguments.address, wait, retries)
    except NoCluster as error:
        print(error, end="", file=sys.stderr)
        return 1
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("run.name", str(error)) from None
    except OSError as error:  # of requests, if the server has gone away in between
        print(f"areal-ray: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1


def refuse_secrets(overrides: Sequence[str]) -> None:
    """Raise ConfigError if an override holds a secret: the command of a job is shown to everybody."""
    from areal_ray.config import ConfigError, redact_override

    def has_secret(text: str) -> bool:
        return redact_override(text) != text or re.search(r"://[^/\s]*@", text) is not None

    if shown := [text for text in overrides if has_secret(text)]:
        key = shown[0].partition("=")[0]
        hint = "the command of a job is shown on the dashboard; give it through the environment of the cluster"
        raise ConfigError(key, hint, "command line")


def _status(arguments: argparse.Namespace) -> int:
    from areal_ray.driver.jobs.server import Jobs

    jobs = Jobs(arguments.address)
    job = jobs.newest(arguments.run_name)
    facts = job.metadata or {}
    state = "stopped, and saved" if job.driver_exit_code == 130 else job.status.value.lower()
    rows = [("job", job.submission_id), ("state", state)]
    rows += [(name.replace("_", " "), facts[name]) for name in ("run", "storage_path", "revision") if name in facts]
    tail = jobs.client.get_job_logs(job.submission_id).strip().splitlines()[-1:]
    rows += [("last line", line) for line in tail]
    for name, value in rows:
        print(f"{name:<13} {value}")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from areal_ray.driver.jobs.server import Jobs
    from areal_ray.driver.jobs.submit import follow

    jobs = Jobs(arguments.address)
    job = jobs.newest(arguments.run_name)
    if arguments.follow and not job.status.is_terminal():
        return follow(jobs, job.submission_id, arguments.run_name)
    print(jobs.client.get_job_logs(job.submission_id), end="")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from areal_ray.driver.jobs.submit import stop
    from areal_ray.run.stop_request import ask_to_stop
    from areal_ray.storage import storage_at

    if (arguments.run_name is None) == (arguments.directory is None):
        raise ValueError("stop takes a run's name, or --directory")
    if arguments.directory is not None:
        ask_to_stop(storage_at(arguments.directory))
        print(f"{arguments.directory}: it saves and leaves")
        return 0
    return stop(arguments.run_name, arguments.address)

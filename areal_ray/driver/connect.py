"""Getting to a Ray cluster: the one that is there, or one of one's own."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from areal_ray.cluster.nodes import is_reachable

# Ray reads RAY_AUTH_MODE when it is imported, so nothing here imports it at the top.
from areal_ray.config import Config
from areal_ray.processes.fork_server import MALLOC, ForkServer, fork_server_for

PREPARATION = "areal_ray.driver.fork_preparation"  # of the fork server, which imports it
BESIDE = 1  # actors that Ray Train starts beside every group: for synchronisation


def use_token() -> None:
    """Show the cluster the token that `ray start` made it ask for.

    `ray start` asks for tokens as soon as this user has one (a local `ray.init` makes one), but clients send it only
    when RAY_AUTH_MODE says so. To be called before the first import of ray.
    """
    have = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if have or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def answering() -> bool:
    """Whether RAY_ADDRESS is host:port of a cluster that runs: one that does not is waited for, a minute, by Ray."""
    address = os.environ.get("RAY_ADDRESS", "")
    return re.fullmatch(r"[^/]+:\d+", address) is not None and is_reachable(address)


@contextmanager
def cluster(config: Config, template: ForkServer | None = None) -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (a submitted job has it), else one on this machine while the block lasts.

    The first processes of the job begin to start at once. A connection that the caller has already is used and left
    alone.

    Args:
        config: of the run.
        template: that is there for it already, closed by who made it.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    made = None if template else fork_server_for(config, PREPARATION)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "runtime_env": _runtime_env(config, template or made)}
    if not os.environ.get("RAY_ADDRESS"):
        # More workers than cores is slow, not wrong: tell Ray what it must hear to place them.
        workers = config.worker_range[1]
        needed = math.ceil(workers * resources(config).get("CPU", 0))
        cores = os.cpu_count() or 1
        if needed > cores:
            print(f"{workers} workers share the {cores} CPU cores of this machine", flush=True)
        # "local", or it would find a cluster that happens to run here.
        options |= {"address": "local", "num_cpus": max(cores, needed), "include_dashboard": False}
    # What a submitted job's own runtime environment has, ours may have too; Ray would refuse to be told twice.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    from ray._private import worker

    shown, worker._worker_logs_enabled = worker._worker_logs_enabled, False  # see console.py, which comes and goes
    try:
        ray.init(**options)
        _start_ahead(config)
        yield
    finally:
        ray.shutdown()
        worker._worker_logs_enabled = shown
        if made:
            made.close()


def _start_ahead(config: Config) -> None:
    """Have processes start, which takes seconds, while the driver gets ready to use them."""
    from areal_ray.cluster import standbys

    if not config.standbys(1):
        return
    try:
        standbys.prestart(1 + BESIDE)  # Ray Train's controller first
    except Exception as error:  # noqa: BLE001  (the call is internal to Ray; without it they start when they are used)
        text = " ".join(str(error).split())[:200]
        print(f"no processes are started ahead: {type(error).__name__}: {text}", flush=True)


def resources(config: Config) -> dict[str, float]:
    """What Ray reserves for one worker."""
    return {"CPU": 1, **({"GPU": 1} if config.cluster.use_gpu else {}), **config.cluster.resources_per_worker}


def _runtime_env(config: Config, template: ForkServer | None) -> dict[str, Any]:
    from areal_ray.driver import warm_start

    settings = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows every line of a worker twice
        # report() waits for all ranks, by default for ever
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.cluster.collective_timeout_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
        # A process that does not answer at all for so long is stopped, or its node is, whatever it was about: a
        # watchdog in it stands still, too.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
        # How long workers that were decided upon are waited for until there is room for them. In a range fewer are
        # tried then; of a fixed number there is nothing else to try.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60" if len(config.usable_sizes) == 1 else "10",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as the controller of Ray Train wants it
        "TOKENIZERS_PARALLELISM": "false",
        **MALLOC,
    }
    chosen = {name: os.environ.get(name, value) for name, value in settings.items()}
    chosen |= {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    executable = {"py_executable": template.executable} if template else {}
    return {"env_vars": {**chosen, **warm_start.job_environment(config)}, **executable}

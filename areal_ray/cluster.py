"""Getting to a Ray cluster: the one that is there, or one of one's own."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads RAY_AUTH_MODE when it is imported, so nothing here imports it at the top.
from areal_ray.config import Config
from areal_ray.template import MALLOC, Template, template_for

# What Ray Train starts one after the other: its controller, and two actors beside every group of workers.
_FIRST = 3


def use_token() -> None:
    """Show the cluster the token that `ray start` made it ask for.

    `ray start` asks for tokens as soon as this user has one (a local `ray.init` makes one), but clients send it only
    when RAY_AUTH_MODE says so. To be called before the first import of ray.
    """
    have = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if have or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def cluster(config: Config, template: Template | None = None) -> Iterator[None]:
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
    made = None if template else template_for(config)
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
    from areal_ray import standby

    if not config.standbys(1):
        return
    try:
        standby.prestart(_FIRST)
    except Exception as error:  # noqa: BLE001  (the call is internal to Ray; without it they start when they are used)
        text = " ".join(str(error).split())[:200]
        print(f"no processes are started ahead: {type(error).__name__}: {text}", flush=True)


def resources(config: Config) -> dict[str, float]:
    """What Ray reserves for one worker."""
    return {"CPU": 1, **({"GPU": 1} if config.cluster.use_gpu else {}), **config.cluster.resources_per_worker}


def _runtime_env(config: Config, template: Template | None) -> dict[str, Any]:
    from areal_ray import standby

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
    # What a submitted job's own runtime environment has is there already; Ray refuses to be told twice.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    chosen = {name: value for name, value in chosen.items() if name not in (job.get("env_vars") or {})}
    executable = {"py_executable": template.executable} if template else {}
    return {"env_vars": {**chosen, **standby.job_environment(config)}, **executable}

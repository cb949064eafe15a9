"""Environments of a job's processes, and the hooks by which Ray has standbys do their imports."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from areal_ray.cluster.ray_internals import SYNC_ACTOR, setup_hook_variable
from areal_ray.cluster.standbys import WARM_UP_S, ready_folder
from areal_ray.config import Config, ConfigError, ModelConfig, redact
from areal_ray.processes.hidden_devices import hidden_devices
from areal_ray.processes.launch import MODEL


def _import_path() -> str:
    """Where this package is: the hook runs before Ray tells a process the driver's path."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))


def job_environment(config: Config) -> dict[str, str]:
    """Environment variables for all processes of the job, among them those that Ray Train starts beside the workers."""
    if not config.standbys(1):
        return {}
    return {setup_hook_variable(): f"{__name__}.warm_plain", "PYTHONPATH": _import_path()}


def worker_environment(config: Config) -> dict[str, str]:
    """Environment variables for the training workers.

    They set these processes apart, too: Ray gives standbys to actors of the very same environment only, so that none is
    taken by the actors that Ray starts beside the workers.
    """
    if not config.standbys(1):
        return {}
    return {
        setup_hook_variable(): f"{__name__}.warm",
        MODEL: json.dumps(redact(asdict(config.model))),
        "PYTHONPATH": _import_path(),
    }


def warm_plain() -> None:
    """Get a process ready for one of Ray Train's own actors; Ray calls it in every new process of the job."""

    def work(late: threading.Event) -> None:
        import_module(SYNC_ACTOR)

    _get_ready("plain", work)


def warm() -> None:
    """Get a process ready for a training worker; Ray calls it in every new process that has the variables."""

    def work(late: threading.Event) -> None:
        import_module("ray.train.torch")
        import_module("areal_ray.controller.rendezvous")
        import_module("areal_ray.worker.main")  # and with it everything else that a worker imports, but
        import_module("areal_ray.data.shuffle")
        with suppress(ConfigError):  # a factory on the driver's path, which Ray tells a process with its work only
            import_module("areal_ray.models").build_model(ModelConfig(**json.loads(os.environ[MODEL])))
        if not late.is_set():  # beside real training a warmup would meet its process group
            import_module("areal_ray.engine.warmup").warm_up()

    _get_ready("worker", work)


def _get_ready(kind: str, work: Callable[[threading.Event], None]) -> None:
    late = threading.Event()

    def get_ready() -> None:
        try:
            with hidden_devices():  # which GPU is its own, Ray says with its work
                work(late)
            folder = ready_folder(kind)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(os.getpid())).touch()
        except Exception:  # a standby without its imports is still a process that need not be started
            logging.getLogger(__name__).warning("could not warm up", exc_info=True)

    thread = threading.Thread(target=get_ready)
    thread.start()
    thread.join(WARM_UP_S)  # imports that take longer are no reason not to start
    late.set()

"""Connection to a Ray cluster: the one that is there, or one of one's own."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

# Ray reads RAY_AUTH_MODE when it is imported, so nothing here imports it at the top.
from areal_ray.cluster import ray_internals
from areal_ray.cluster.nodes import is_reachable
from areal_ray.config import Config, ConfigError
from areal_ray.processes.fork_server import ForkServer, fork_server_for, process_environment
from areal_ray.processes.own_session import children_in_own_session
from areal_ray.processes.reaper import Reaper
from areal_ray.storage.local import deny_writing_to_all

PREPARATION = "areal_ray.driver.fork_preparation"  # of the fork server, which imports it
_PORT = "RAY_GCS_SERVER_PORT"  # of a cluster that `ray.init` starts
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
WRONG_TOKEN = (
    "the cluster there does not take this token, or none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own"
)
_SHARED = ("logs", "logs/old", "sockets", "runtime_resources")  # directories of a session that Ray opens to all
BESIDE = 1  # actors that Ray Train starts beside every group: for synchronisation


def use_token() -> None:
    """Show the cluster the token that `ray start` made it ask for.

    `ray start` asks for tokens as soon as this user has one (a local `ray.init` makes one), but clients send it only
    when RAY_AUTH_MODE says so. To be called before the first import of ray.
    """
    have = any(os.environ.get(name) for name in _TOKENS)
    if have or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def answering() -> bool:
    """Whether RAY_ADDRESS is host:port of a cluster that runs: one that does not is waited for, a minute, by Ray."""
    address = os.environ.get("RAY_ADDRESS", "")
    return re.fullmatch(r"[^/]+:\d+", address) is not None and is_reachable(address)


def unreachable(patience_s: float = 6.0) -> str | None:
    """Why RAY_ADDRESS cannot be used: host:port where nobody answers for so many seconds. None: it can be tried."""
    address = os.environ.get("RAY_ADDRESS", "")
    if re.fullmatch(r"[^/]+:\d+", address) is None:
        return None
    until = time.monotonic() + patience_s
    while not is_reachable(address):
        if time.monotonic() > until:
            return f"no Ray cluster answers at {address}, which RAY_ADDRESS names: start it there, or unset RAY_ADDRESS"
        time.sleep(min(1.0, patience_s / 4))
    return None


def is_off(config: Config) -> bool:
    """Whether fast restarts are switched off; YAML reads a bare `off` as False."""
    return config.cluster.fast_restarts in ("off", False)


def slow_because(config: Config, train: bool) -> str | None:
    """Find why this job is to do with Ray's public API alone; None if Ray's internals can be used.

    Args:
        config: of the run.
        train: look at Ray Train, too, which imports it: seconds.
    """
    if is_off(config):
        return "cluster.fast_restarts=off"
    problems = ray_internals.core_problems() or (ray_internals.train_problems() if train else [])
    if not problems:
        return None
    return f"{problems[0]}{f', and {len(problems) - 1} more' if len(problems) > 1 else ''}"


def _without_internals(config: Config) -> Config:
    """The configuration to connect with: without the standbys and the fork server that take Ray's internals."""
    return replace(config, cluster=replace(config.cluster, standbys="off", template=False))


@contextmanager
def cluster(config: Config, fork_server: ForkServer | None = None, fast: bool | None = None) -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (a submitted job has it), else one on this machine while the block lasts.

    The first processes of the job begin to start at once. A connection that the caller has already is used and left
    alone.

    Args:
        config: of the run.
        fork_server: fork server that is there already, closed by its maker.
        fast: use Ray's internals; None: unless they are switched off or those of `import ray` are not as expected.
    """
    import ray

    deny_writing_to_all()
    if ray.is_initialized():
        yield
        return
    quiet: AbstractContextManager[None]
    if fast is None:
        fast = slow_because(config, train=False) is None
    if fast:
        quiet = ray_internals.worker_logs_printed(False)  # the Console, which comes and goes, prints them
    else:
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray itself prints then
        config, fork_server, quiet = _without_internals(config), None, nullcontext()
    made = None if fork_server else fork_server_for(config, PREPARATION)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "runtime_env": _runtime_env(config, fork_server or made)}
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        options |= _local_options(config)
        _make_token()
    port = os.environ.get(_PORT)
    if not fast and not address:
        os.environ[_PORT] = port or _free_port()
        address = f"{ray.util.get_node_ip_address()}:{os.environ[_PORT]}"
        options["include_dashboard"] = True
    if address:
        # Ray Train's own actors ask the dashboard's server for the controller: on a machine with several clusters that
        # of the newest, and take the controller, which that one does not know, for dead.
        options["runtime_env"]["env_vars"].setdefault("RAY_ADDRESS", address)
    # A submitted job's own runtime environment may have the same keys; Ray would refuse to be told twice.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    reaper: Reaper | None = None
    with quiet:
        try:
            try:
                groups = _init(options)
            finally:  # as the user has it: it is for this cluster only
                os.environ.pop(_PORT, None)
                if port is not None:
                    os.environ[_PORT] = port
            reaper = Reaper(groups) if groups else None
            if fast and "address" in options:
                _close_to_writers(Path(ray_internals.session_directory()))
            _start_ahead(config)
            yield
        finally:
            ray.shutdown()
            if reaper:
                reaper.close()
            if made:
                made.close()


def _leads_a_group(pid: int) -> bool:
    """Whether there is still such a process: the number of one that has ended may be somebody else's one day."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _make_token() -> None:
    """Make the token that `ray.init` makes for a cluster of one's own: its file could be read by every user."""
    named = any(os.environ.get(name) for name in _TOKENS)
    if named or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(file, "w") as token:
            token.write(secrets.token_hex(32))


def _close_to_writers(session: Path) -> None:
    """Take the right to write from all other users in the directories of a cluster of one's own, where its logs are.

    Ray gives it to them, for clusters that several users share.
    """
    for folder in filter(Path.is_dir, (session, *map(session.joinpath, _SHARED))):
        folder.chmod(folder.stat().st_mode & 0o7775)


def _init(options: dict[str, Any]) -> list[int]:
    """Call `ray.init`; the process groups that it has started."""
    import ray

    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    with children_in_own_session() as groups:
        try:
            ray.init(**options)
        except RuntimeError as error:
            raise _other_versions(str(error)) or error from None
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            # The one has the text of the other's traceback in its cause.
            if ray.exceptions.AuthenticationError.__name__ not in f"{type(error).__name__} {error.__cause__}":
                raise
            raise ConfigError("", WRONG_TOKEN, "RAY_ADDRESS") from None
    if ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has set a handler
    return [group for group in groups if _leads_a_group(group)]


def _other_versions(text: str) -> ConfigError | None:
    """Ray's paragraph about a cluster of another Ray or Python as one line; None if it is about something else."""
    found = re.findall(r"(Ray|Python): (\S+)", text)
    if "Version mismatch" not in text or len(found) != 4:
        return None
    theirs, ours = (" and ".join(f"{name} {number}" for name, number in half) for half in (found[:2], found[2:]))
    return ConfigError("", f"the cluster has {theirs}, and here is {ours}: they must be the same", "RAY_ADDRESS")


def _local_options(config: Config) -> dict[str, Any]:
    """Options of `ray.init` for a cluster on this machine."""
    # More workers than cores is slow, not wrong: tell Ray what it must hear to place them.
    workers = config.worker_range[1]
    needed = math.ceil(workers * config.worker_resources.get("CPU", 0))
    cores = os.cpu_count() or 1
    if needed > cores:
        print(f"{workers} workers share the {cores} CPU cores of this machine", flush=True)
    # "local", or it would find a cluster that happens to run here.
    return {"address": "local", "num_cpus": max(cores, needed), "include_dashboard": False}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


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


def _runtime_env(config: Config, fork_server: ForkServer | None) -> dict[str, Any]:
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
    }
    chosen = {name: os.environ.get(name, value) for name, value in settings.items()}
    chosen |= {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    executable = {"py_executable": fork_server.executable} if fork_server else {}
    own = {**process_environment(config), **warm_start.job_environment(config)}
    return {"env_vars": {**chosen, **own}, **executable}

"""The driver of a run: checks everything, hands the job to Ray Train, reports its end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from areal_ray.checkpoint import Catalog
from areal_ray.cluster import failures, ray_internals
from areal_ray.cluster.bad_devices import readmit
from areal_ray.cluster.console import Display, display
from areal_ray.cluster.head_watch import watching
from areal_ray.cluster.killers import with_killer
from areal_ray.cluster.requests import Requests, StoppedWhileWaiting, requests_to, taken_over
from areal_ray.config import Config, ConfigError, dump, redact_override
from areal_ray.driver.connect import cluster, slow_because
from areal_ray.driver.data import noted
from areal_ray.driver.ending import Ending, has_no_checkpoint
from areal_ray.driver.exports import Exporter
from areal_ray.driver.hints import hint
from areal_ray.driver.opening import counted_operations, opening
from areal_ray.driver.panel import show
from areal_ray.driver.preflight import prepare, serving
from areal_ray.driver.rate_jump import rate_jump
from areal_ray.driver.signals import ask_in_background, stopping_on_signals
from areal_ray.driver.supervisor import choose_fit, supervise
from areal_ray.processes.fork_server import ForkServer
from areal_ray.run import JobContext, RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.run.lease import RunInUse, hold_lease, let_go
from areal_ray.run.logs.event_index import STOPPED_EARLY
from areal_ray.run.shared_storage import leave_token
from areal_ray.run.stop_request import hearing_stop

_LOOK_S = 0.5  # between two looks at the head node: one that is replaced may be away for two seconds


def train(
    config: Config,
    overrides: Sequence[str] = (),
    fork_server: ForkServer | None = None,
    search_path: Sequence[str] = (),
    early: ExitStack | None = None,
) -> int:
    """Run an experiment to its end.

    Args:
        config: as loaded.
        overrides: typed beside the file, for the record.
        fork_server: fork server for the job's processes, if one has been started.
        search_path: folders with the user's own code, for the workers.
        early: holds a connection that was opened before Ray Train could be looked at; closed here if it is not to be
            used as it was opened.

    Returns:
        The exit status: 0 when the run reached its last step, 1 when training failed.

    Raises:
        ConfigError: before anything is trained or written.
    """
    lines: list[str] = []
    given = config
    run, config, sources = prepare(given, look=lambda *seen: lines.extend(opening(given, *seen)))
    done = Catalog(run.storage).newest()
    ended = done is not None and _stopped_early(config, run, done.step)
    if done is not None and (done.step >= config.last_step or ended):
        go_on = "eval.early_stopping=null, or more patience" if ended else "a later train.stop_at or more train.steps"
        print(
            f"{config.run.name} has {'stopped early after' if ended else 'finished'} step {done.step} already "
            f"({run.storage.location}/{done.name}).\nTo go on: {go_on}. To begin anew: another run.name."
        )
        at_end = ended or done.step == config.train.steps
        return _export_what_is_missing(config, run, search_path, done.name if at_end else None)
    try:
        run.storage.ensure(config.run.private)
    except OSError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    if done is not None and (jump := rate_jump(done, config)):
        lines.append(f"learning rate: {jump}")
    print("\n".join([*lines, f"run directory: {run.storage.location}"]), flush=True)
    operations, unknown = counted_operations(config)
    if unknown:
        print(unknown, flush=True)
    if config.cluster.use_gpu and (gpus := config.cluster.resources_per_worker.get("GPU", 1)) > 1:
        print(f"each worker reserves {gpus:g} GPUs and trains on one of them: the others stay unused", flush=True)
    slow = slow_because(config, train=True)
    if slow:
        print(f"restarts take longer, with Ray's public API alone: {slow}", flush=True)
        if early is not None:
            early.close()
    job = secrets.token_hex(8)
    run = RunDir(run.storage, job)
    live = slow is None and sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    context = JobContext(run, job, slow is None, tuple(search_path), operations, live, serving(config))
    # Until the cluster is closed: a second signal must not end the driver in the middle of that.
    with (
        ExitStack() as signals,
        display(context.fast_restarts, live) as shown,
        cluster(config, fork_server, slow is None),
    ):
        requests = requests_to(context.submission, context.fast_restarts)

        def stop() -> None:
            requests.ask("stop")

        asked = signals.enter_context(stopping_on_signals(stop))
        with ExitStack() as lease:
            try:
                # A driver that loses the lease asks the workers to leave, so that there must be a cluster first.
                lost = partial(ask_in_background, stop, "saving nothing more, and leaving")
                lease.enter_context(hold_lease(run.storage, lost, _print))
                lease.enter_context(hearing_stop(run.storage, partial(_asked_to_stop, stop, asked)))
                run.clear(_print)
                run.fence.take()
                run.write_config(_record(config, overrides))
                # The workers open what is noted here.
                run.write_data(noted(config, sources))
                leave_token(run.storage, context.submission)
                readmit(run, config.cluster.use_again, _print)
                exporter = None if config.export is None else Exporter(config, run, search_path, _print)
                lease.enter_context(nullcontext() if exporter is None else exporter.beside())
            except RunInUse as error:
                raise ConfigError("run.name", str(error)) from None
            except OSError as error:
                raise ConfigError("run.storage_path", str(error)) from None
            try:
                ending = Ending(run, config.on_end)
                status = _drive(config, context, shown, requests, asked, ending, exporter)
                ending.tell()
                return status
            except RunTaken as taken:
                print(taken, flush=True)
                return 1


def _drive(
    config: Config,
    context: JobContext,
    shown: Display,
    requests: Requests,
    asked_to_stop: threading.Event,
    ending: Ending,
    exporter: Exporter | None,
) -> int:
    run = context.run
    about = {"submission": context.submission, "versions": context.versions}
    run.note("submitted", print, last_step=config.last_step, **about)
    address = ray.get_runtime_context().gcs_address
    try:
        identity = partial(ray_internals.cluster_id, address) if context.fast_restarts else lambda: None
        lost = partial(_lost_head, config, run, address)
        with watching(address, _print, lost, identity=identity, look_s=_LOOK_S):
            outcome = supervise(choose_fit(config, context), run, sleep=asked_to_stop.wait)
    except StoppedWhileWaiting:
        return ending.interrupted()
    except (TrainingFailedError, RayError, OSError) as error:
        workers, controller = getattr(error, "worker_failures", {}), getattr(error, "controller_failure", error)
        if isinstance(controller, StoppedWhileWaiting):
            return ending.interrupted()
        if taken := taken_over([*workers.values(), controller]):
            raise RunTaken(taken) from None
        cause = with_killer(failures.cause_of(error, run), run)
        shown.wait_for_end(timeout_s=1.0)
        logs = ray_internals.log_directory() if context.fast_restarts else "Ray's session directory"
        show(cause, run, logs, hint(cause, config, run))
        ending.close("failed", {}, cause=cause.kind, error=cause.message[:500])
        return 1
    except KeyboardInterrupt:
        return ending.interrupted()
    finally:
        requests.close()
    shown.wait_for_end()
    if has_no_checkpoint(run):
        text = f"the workers ended at step {outcome['step']}, and there is no checkpoint in {run.storage.location}"
        ending.close("failed", {}, cause="no checkpoint", error=text)
        print(text, flush=True)
        return 1
    if outcome["reason"] == "stop":
        return ending.interrupted()
    early = outcome["reason"] == "early"
    status = "finished" if early or outcome["step"] == config.train.steps else "stopped"
    checkpoint = ending.finished(status, outcome)
    if exporter is not None:
        exporter.finish(checkpoint if status == "finished" else None, asked_to_stop.is_set)
    return 0


def _export_what_is_missing(config: Config, run: RunDir, search_path: Sequence[str], name: str | None) -> int:
    """Make the exports of a run that has ended that were killed, or asked for since; the exit status.

    Args:
        name: of its last checkpoint, if that is the end of the run; None: it has stopped before.
    """
    if config.export is None:
        return 0
    run = RunDir(run.storage, secrets.token_hex(8))
    exporter = Exporter(config, run, search_path, _print)
    try:
        if exporter.is_done(name):
            return 0
        with hold_lease(run.storage, exporter.stop, _print):
            run.fence.take()
            exporter.finish(name)
    except RunInUse as error:
        raise ConfigError("run.name", str(error)) from None
    except OSError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    except RunTaken as taken:
        _print(str(taken))
        return 1
    return 0


def _stopped_early(config: Config, run: RunDir, step: int) -> bool:
    """Whether the run has come to its end at this step by the rule of now: if that has changed, the workers decide."""
    rule = config.eval.early_stopping
    event = None if rule is None else run.newest(STOPPED_EARLY)
    return rule is not None and event is not None and (event["step"], event.get("rule")) == (step, asdict(rule))


def _lost_head(config: Config, run: RunDir, address: str) -> None:
    """End this process, whatever else goes wrong: a call that waits for an answer would wait until Ray ends it."""
    text, status = f"the head node ({address}) is gone, and the cluster with it", 1
    ending = Ending(run, config.on_end)
    try:
        newest = None
        with suppress(OSError):  # storage that is away, too
            newest = Catalog(run.storage).newest()
        early = newest is not None and _stopped_early(config, run, newest.step)
        if newest is not None and (newest.step >= config.last_step or early):  # it has no more to do
            ended = "finished" if early or newest.step == config.train.steps else "stopped"
            ending.close(ended, {"step": newest.step}, step=newest.step)
            print(f"{text}, after the last step was saved")
            print(f"checkpoint: {run.storage.location}/{newest.name}", flush=True)
            status = 0
        else:
            checkpoint = ending.close("failed", {}, cause="the head node is gone", error=text)[0]["checkpoint"]
            begin = checkpoint or "the beginning"
            print(f"{text}; on another cluster the same command goes on from {begin}", flush=True)
        ending.tell()
    except RunTaken as taken:
        print(taken, flush=True)
    finally:
        with suppress(OSError):  # last: the thread that keeps the lease would take it again
            let_go(run.storage)
        os._exit(status)


def _asked_to_stop(stop: Callable[[], None], asked: threading.Event) -> None:
    asked.set()
    ask_in_background(stop, "asked to stop: saving")


def _print(text: str) -> None:
    print(text, flush=True)


def _record(config: Config, overrides: Sequence[str]) -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    head = [
        f"# git revision: {git.stdout.strip() or 'unknown'}",
        *(f"# override: {text}" for text in map(redact_override, overrides)),
    ]
    return "\n".join(head) + "\n" + dump(config)

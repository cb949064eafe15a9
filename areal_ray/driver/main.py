"""The driver of a run: checks everything, hands the job to Ray Train, reports its end."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from areal_ray.checkpoint import Catalog
from areal_ray.cluster import failures, ray_internals
from areal_ray.cluster.bad_devices import readmit
from areal_ray.cluster.console import Display, display
from areal_ray.cluster.head_watch import watching
from areal_ray.cluster.requests import Requests, StoppedWhileWaiting, requests_to, taken_over
from areal_ray.config import Config, ConfigError, dump, redact_override
from areal_ray.driver.connect import cluster, slow_because
from areal_ray.driver.data import noted
from areal_ray.driver.exports import Exporter
from areal_ray.driver.hints import hint
from areal_ray.driver.panel import show
from areal_ray.driver.preflight import prepare, serving
from areal_ray.driver.signals import ask_in_background, stopping_on_signals
from areal_ray.driver.supervisor import choose_fit, supervise
from areal_ray.processes.fork_server import ForkServer
from areal_ray.run import JobContext, RunDir
from areal_ray.run.directory import REPORT
from areal_ray.run.fence import RunTaken
from areal_ray.run.goodput import History, account, history, table
from areal_ray.run.lease import RunInUse, hold_lease, let_go
from areal_ray.run.logs.event_index import STOPPED_EARLY
from areal_ray.run.shared_storage import leave_token
from areal_ray.run.stop_request import hearing_stop
from areal_ray.tools.report import page, read_course

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
    run, config, sources = prepare(config)
    done = Catalog(run.storage).newest()
    ended = done is not None and _stopped_early(config, run, done.step)
    if done is not None and (done.step >= config.last_step or ended):
        go_on = "eval.early_stopping=null, or more patience" if ended else "a later train.stop_at or more train.steps"
        print(
            f"{config.run.name} has {'stopped early after' if ended else 'finished'} step {done.step} already "
            f"({run.storage.location}/{done.name}).\nTo go on: {go_on}. To begin anew: another run.name."
        )
        if config.export is not None and (ended or done.step == config.train.steps):
            _export_what_is_missing(Exporter(config, run, search_path, _print), run, done.name)
        return 0
    try:
        run.storage.ensure(config.run.private)
    except OSError as error:
        raise ConfigError("run.storage_path", str(error)) from None
    print(f"run directory: {run.storage.location}", flush=True)
    if config.cluster.use_gpu and (gpus := config.cluster.resources_per_worker.get("GPU", 1)) > 1:
        print(f"each worker reserves {gpus:g} GPUs and trains on one of them: the others stay unused", flush=True)
    slow = slow_because(config, train=True)
    if slow:
        print(f"restarts take longer, with Ray's public API alone: {slow}", flush=True)
        if early is not None:
            early.close()
    job = secrets.token_hex(8)
    run = RunDir(run.storage, job)
    context = JobContext(run, job, slow is None, tuple(search_path), serving(config))
    # Until the cluster is closed: a second signal must not end the driver in the middle of that.
    with ExitStack() as signals, display(context.fast_restarts) as shown, cluster(config, fork_server, slow is None):
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
                return _drive(config, context, shown, requests, asked, exporter)
            except RunTaken as taken:
                print(taken, flush=True)
                return 1


def _drive(
    config: Config,
    context: JobContext,
    shown: Display,
    requests: Requests,
    asked_to_stop: threading.Event,
    exporter: Exporter | None,
) -> int:
    run = context.run
    run.note("submitted", print, last_step=config.last_step, submission=context.submission)
    address = ray.get_runtime_context().gcs_address
    try:
        identity = partial(ray_internals.cluster_id, address) if context.fast_restarts else lambda: None
        lost = partial(_lost_head, config, run, address)
        with watching(address, _print, lost, identity=identity, look_s=_LOOK_S):
            outcome = supervise(choose_fit(config, context), run, sleep=asked_to_stop.wait)
    except StoppedWhileWaiting:
        return _interrupted(run)
    except (TrainingFailedError, RayError, OSError) as error:
        workers, controller = getattr(error, "worker_failures", {}), getattr(error, "controller_failure", error)
        if isinstance(controller, StoppedWhileWaiting):
            return _interrupted(run)
        if taken := taken_over([*workers.values(), controller]):
            raise RunTaken(taken) from None
        cause = failures.cause_of(error, run)
        shown.wait_for_end(timeout_s=1.0)
        logs = ray_internals.log_directory() if context.fast_restarts else "Ray's session directory"
        show(cause, run, logs, hint(cause, config))
        _close(run, "failed", {}, cause=cause.kind, error=cause.message[:500])
        return 1
    except KeyboardInterrupt:
        return _interrupted(run)
    finally:
        requests.close()
    shown.wait_for_end()
    if _has_no_checkpoint(run):
        text = f"the workers ended at step {outcome['step']}, and there is no checkpoint in {run.storage.location}"
        _close(run, "failed", {}, cause="no checkpoint", error=text)
        print(text, flush=True)
        return 1
    if outcome["reason"] == "stop":
        return _interrupted(run)
    early = outcome["reason"] == "early"
    status = "finished" if early or outcome["step"] == config.train.steps else "stopped"
    result, past = _close(run, status, outcome, step=outcome["step"])
    _summary(run, result, past)
    if exporter is not None and status == "finished" and result["checkpoint"] is not None:
        exporter.finish(result["checkpoint"], asked_to_stop.is_set)
    return 0


def _export_what_is_missing(exporter: Exporter, run: RunDir, name: str) -> None:
    """Make the exports of a finished run that were killed, or asked for since."""
    if exporter.is_done(name):
        return
    try:
        with hold_lease(run.storage, lambda: None, _print):
            exporter.finish(name)
    except RunInUse as error:
        raise ConfigError("run.name", str(error)) from None


def _stopped_early(config: Config, run: RunDir, step: int) -> bool:
    """Whether the run has come to its end at this step by the rule of now: if that has changed, the workers decide."""
    rule = config.eval.early_stopping
    event = None if rule is None else run.newest(STOPPED_EARLY)
    return rule is not None and event is not None and (event["step"], event.get("rule")) == (step, asdict(rule))


def _lost_head(config: Config, run: RunDir, address: str) -> None:
    """End this process, whatever else goes wrong: a call that waits for an answer would wait until Ray ends it."""
    text, status = f"the head node ({address}) is gone, and the cluster with it", 1
    try:
        newest = None
        with suppress(OSError):  # storage that is away, too
            newest = Catalog(run.storage).newest()
        if newest is not None and newest.step >= config.last_step:  # it has no more to do
            ended = "finished" if newest.step == config.train.steps else "stopped"
            _close(run, ended, {"step": newest.step}, step=newest.step)
            print(f"{text}, after the last step was saved")
            print(f"checkpoint: {run.storage.location}/{newest.name}", flush=True)
            status = 0
        else:
            checkpoint = _close(run, "failed", {}, cause="the head node is gone", error=text)[0]["checkpoint"]
            begin = checkpoint or "the beginning"
            print(f"{text}; on another cluster the same command goes on from {begin}", flush=True)
    except RunTaken as taken:
        print(taken, flush=True)
    finally:
        with suppress(OSError):  # last: the thread that keeps the lease would take it again
            let_go(run.storage)
        os._exit(status)


def _asked_to_stop(stop: Callable[[], None], asked: threading.Event) -> None:
    asked.set()
    ask_in_background(stop, "asked to stop: saving")


def _has_no_checkpoint(run: RunDir) -> bool:
    """Whether this process sees none: then nobody can go on, whatever the workers said. Not if storage is away."""
    try:
        return Catalog(run.storage).last_committed() is None
    except OSError:
        return False


def _print(text: str) -> None:
    print(text, flush=True)


def _close(run: RunDir, status: str, outcome: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], History | None]:
    """Write the last event and result.json; the result, and the course of the run if it could be read."""
    run.note(status, print, **fields)
    result: dict[str, Any] = {"status": status, "step": 0, "loss": None, "restarts": 0, "checkpoint": None, **outcome}
    past: History | None = None
    try:
        past = history(run)
        result = _result(run, status, outcome, past)
        run.write_result(result)
    except OSError as error:
        print(f"could not write result.json: {error}", flush=True)
    _report(run)
    return result, past


def _report(run: RunDir) -> None:
    try:
        run.write_report(page([read_course(run)]))
    except Exception as error:  # noqa: BLE001  (a picture of the run, whose outcome must not depend on it)
        print(f"could not write report.html: {type(error).__name__}: {error}", flush=True)


def _interrupted(run: RunDir) -> int:
    checkpoint = _close(run, "interrupted", {})[0]["checkpoint"]
    print(f"interrupted; the same command goes on from {checkpoint or 'the beginning'}", flush=True)
    return 130


def _record(config: Config, overrides: Sequence[str]) -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    head = [
        f"# git revision: {git.stdout.strip() or 'unknown'}",
        *(f"# override: {text}" for text in map(redact_override, overrides)),
    ]
    return "\n".join(head) + "\n" + dump(config)


def _result(run: RunDir, status: str, outcome: dict[str, Any], past: History) -> dict[str, Any]:
    newest = Catalog(run.storage).newest()
    attempts = [event for event in past.events if event["event"] == "attempt"]
    submitted = sum(event["event"] == "submitted" for event in past.events)
    planned = sum(event["event"] == "left" and event["reason"] != "stop" for event in past.events)
    return {
        "status": status,
        "step": outcome.get("step", newest.step if newest else 0),
        "loss": outcome.get("loss"),
        "world_size": outcome.get("world_size", attempts[-1].get("world_size") if attempts else None),
        "restarts": max(0, len(attempts) - submitted - planned),
        "checkpoint": newest.name if newest else None,
        "goodput": account(past),
    }


def _summary(run: RunDir, result: dict[str, Any], past: History | None) -> None:
    n = result["restarts"]
    loss = "" if result["loss"] is None else f"loss {result['loss']:.4f}, "  # None: the last step was left out
    print(f"{result['status']}: step {result['step']}, {loss}{n} restart{'s' * (n != 1)}")
    if past is not None:
        _summarize(past, n)
    print(f"checkpoint: {run.storage.location}/{result['checkpoint']}")
    print(f"report: {run.storage.location}/{REPORT}", flush=True)


def _summarize(past: History, restarts: int) -> None:
    if len(past.held_out) > 1:
        (first_step, first), (last_step, last) = past.held_out[0], past.held_out[-1]
        print(f"held-out loss: {first:.4f} at step {first_step}, {last:.4f} at step {last_step} ({last / first:.0%})")
    spent = account(past)
    if spent["share"] is not None:
        seconds = f"{spent['steps_s']:.0f} of {spent['wall_s']:.0f} s"
        print(f"goodput: {spent['share']:.0%} of the time went into steps that count ({seconds})")
    if restarts:
        print(f"where starts took their time, in seconds:\n{table(spent)}")

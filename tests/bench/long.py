"""Long runs: what a start, a restart, a list and a save cost after many checkpoints and many lines of logs.

CPU seconds of this process and requests to the tests' S3 server, which noise does not touch. Checkpoints are copies of
one, lines of logs are written as a run would have written them.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from areal_ray.checkpoint import Catalog, Manifest, SyncWriter, read_manifest, save
from areal_ray.cluster.bad_devices import BadNodes
from areal_ray.cluster.failures import hung_cause, step_of
from areal_ray.config import KeepConfig
from areal_ray.controller import snapshot
from areal_ray.distributed import Ranks
from areal_ray.driver import preflight
from areal_ray.run import RunDir
from areal_ray.run.lease import hold_lease
from areal_ray.storage import LocalStorage, Storage, storage_at
from areal_ray.tools import checkpoints
from areal_ray.train.journal import Journal, retention
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from areal_ray.worker.start import Start

from ..s3_proxy import S3Proxy
from ..s3_server import S3Server
from . import report
from .options import Options

CHECKPOINTS = (10, 1000)
LINES = (100, 1_000_000)
TENSORS = 4000
KEEP = KeepConfig(last=2, every_steps=10)  # of the copies every one


class Box:
    """A state of `tensors` small tensors."""

    def __init__(self, tensors: int, elements: int = 64) -> None:
        self.tree: dict[str, Any] = {f"{n:05}": torch.full((elements,), float(n)) for n in range(tensors)}

    def state_dict(self) -> dict[str, Any]:
        return self.tree

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tree = state


def copies(run: Storage, count: int, tensors: int = 440) -> None:
    """Checkpoints of steps 10, 20, ... with as many tensors as one of a 1B model has."""
    with tempfile.TemporaryDirectory() as folder:
        original = LocalStorage(folder).sub("step-00000010.a1")
        save(original, {"box": Box(tensors)}, {"step": 10, "attempt": 1}, Ranks())
        manifest, files = read_manifest(original), {name: original.read(name) for name in original.names()}

    def copy(n: int) -> None:
        step = 10 * (n + 1)
        info = {"step": step, "attempt": 1, "time": 1.7e9 + n, "world_size": 1, "metrics": {"held_out_loss": 3.0}}
        directory = run.sub(Catalog.name(step, 1))
        directory.make()
        for name, data in files.items():
            if name != "manifest.json":
                with directory.create(name) as file:
                    file.write(data)
        directory.publish("manifest.json", Manifest(info, manifest.files).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, range(count)))


def logs(path: Path, lines: int) -> None:
    """A ledger of one attempt in ten thousand events, and metrics."""
    with open(path / "events.jsonl", "w") as file:
        for n in range(lines):
            event: dict[str, Any] = {"event": "saved", "attempt": n // 10000 + 1, "step": n, "blocked_s": 0.01}
            event |= {"checkpoint": Catalog.name(n, n // 10000 + 1), "bytes": 10**9, "waited_s": 0.0, "total_s": 1.0}
            if n % 10000 == 0:
                event |= {"event": "attempt", "world_size": 2, "nodes": ["one", "two"], "pids": [1, 2]}
            file.write(json.dumps({"time": 1.7e9 + n, **event}) + "\n")
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(lines):
            values = {"loss": 2.345678, "grad_norm": 1.234, "lr": 1e-4, "tokens_per_s": 12345.6, "step_time_s": 0.1234}
            file.write(json.dumps({"step": step, **values}) + "\n")


class Meter:
    """CPU seconds of this process, and requests if there is a proxy."""

    def __init__(self, proxy: S3Proxy | None = None) -> None:
        self._proxy = proxy

    def of(self, work: Callable[[], object]) -> float:
        before = len(self._proxy.methods) if self._proxy else time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            work()
        return len(self._proxy.methods) - before if self._proxy else time.process_time() - before


def restart_logs(run: RunDir) -> None:
    """What the controller and rank 0 ask the logs for when a worker was killed, each in a process of its own."""
    run = RunDir(run.storage)
    hung_cause(run, {})
    step_of({}, lambda: run)
    run = RunDir(run.storage)
    run.next_attempt(0)
    Start(1, run, Ranks(), print, Catalog(run.storage)).left_out_steps()
    last = run.reached()
    run.rewind_metrics(last - 5)
    run.rewind_samples(0)
    for step in range(last - 4, last + 1):
        run.log_metrics(step, {"loss": 1.0})


def start(run: Storage) -> None:
    """What the driver does with the run directory before Ray Train is started, and Ray's list of checkpoints."""
    directory = RunDir(run)
    preflight._try_writing(run)
    Catalog(run).newest()
    Catalog(run).newest()  # `train` asks whether there is anything left to do
    with hold_lease(run, lambda: None, print, settle_s=0.0):
        directory.write_config("")
        directory.note("submitted", print)
        BadNodes(directory, print).load()
        snapshot.rebuild(run)


def restart(run: Storage) -> None:
    """What the controller and rank 0 do with the run directory when workers are started again, but for the loading."""
    controller, directory, catalog = RunDir(run), RunDir(run), Catalog(run)
    hung_cause(controller, {})
    controller.note("failure", print, rank=0, cause="bench", error="", where="")
    Catalog(run).last_committed()
    catalog.last_committed()
    directory.next_attempt(catalog.last_attempt())
    directory.note("attempt", print, attempt=1, world_size=1, nodes=["one"], pids=[1])
    Start(1, directory, Ranks(), print, catalog).left_out_steps()
    newest = catalog.newest()
    assert newest is not None
    directory.reached()
    directory.rewind_metrics(newest.step)
    directory.rewind_samples(0)
    retention(directory, 99, print, catalog, KEEP).clean_up(99)


def saving(run: Storage, tensors: int = 440) -> Callable[[int], object]:
    """A function that saves at a step; of a rank that has saved twice already, so that every save deletes one."""
    ranks, catalog, directory = Ranks(), Catalog(run), RunDir(run)
    journal = Journal(directory, 2, print, retention(directory, 2, print, catalog, KEEP))
    state = {"box": Box(tensors, 1000)}
    handler = RecoverHandler(catalog, state, SyncWriter(ranks), journal, 2, {}, ranks, SavePolicy())
    for number in range(-3, 0):
        handler.save(1_000_001 + 10 * number, {"loss": 1.0})
    return lambda number: handler.save(1_000_001 + 10 * number, {"loss": 1.0})


def measure(run: Storage, meter: Meter, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"start": [], "restart": [], "ckpt ls": [], "a save with retention": []}
    found["first start"] = [meter.of(lambda: start(run))]  # of a run that has no index yet
    for _ in range(rounds):
        found["start"].append(meter.of(lambda: start(run)))
        found["restart"].append(meter.of(lambda: restart(run)))
        found["ckpt ls"].append(meter.of(lambda: checkpoints.listing(run)))
    one = saving(run)
    for number in range(rounds):
        found["a save with retention"].append(meter.of(lambda number=number: one(number)))  # type: ignore[misc]
    return found


def compared(title: str, unit: str, found: dict[int, dict[str, list[float]]]) -> list[dict]:
    few, _ = found
    return [
        report.show(f"{name}: {title}", unit, {f"{n:,}": found[n][name] for n in found}, f"{few:,}")
        for name in found[few]
    ]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def on_disk(rounds: int) -> list[dict]:
    found = {}
    for count in CHECKPOINTS:
        with folder() as path:
            copies(LocalStorage(path), count)
            found[count] = measure(LocalStorage(path), Meter(), rounds)
            found[count]["areal-ray ckpt ls, the command"] = [_command(path) for _ in range(rounds)]
    return compared("checkpoints in the run directory", "s of CPU", found)


def _command(path: Path) -> float:
    """CPU seconds of a process."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    code = f"from areal_ray.cli.main import main; main(['ckpt', 'ls', {str(path)!r}])"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return spent() - before


def on_s3(rounds: int) -> list[dict]:
    found = {}
    with folder() as path:
        server = S3Server(path / "s3")
        server.start()
        proxy = S3Proxy(server.options["endpoint"])
        proxy.start()
        try:
            for count in CHECKPOINTS:
                place = f"s3://runs/long-{count}/run"
                copies(storage_at(place, server.options), count, tensors=20)
                run = storage_at(place, {**server.options, "endpoint": proxy.endpoint})
                found[count] = measure(run, Meter(proxy), rounds)
        finally:
            proxy.stop()
            server.stop()
    return compared("checkpoints in object storage", "requests", found)


def of_logs(rounds: int) -> list[dict]:
    found = {}
    for lines in LINES:
        with folder() as path:
            logs(path, lines)
            run = RunDir(LocalStorage(path))
            first = [Meter().of(lambda run=run: restart_logs(run))]  # type: ignore[misc]
            later = [Meter().of(lambda run=run: restart_logs(run)) for _ in range(rounds)]  # type: ignore[misc]
            found[lines] = {"first restart": first, "restart": later}
    return compared("lines of metrics and events", "s of CPU", found)


def digest() -> dict:
    with folder() as path:
        directory = LocalStorage(path).sub("step-00000001.a1")
        save(directory, {"box": Box(TENSORS)}, {"step": 1, "attempt": 1}, Ranks())
        seconds = Meter().of(lambda: checkpoints.digest(directory))
        return report.figures(f"digest of {TENSORS:,} tensors", cpu_s=seconds)


def run(options: Options) -> list[dict]:
    return [*of_logs(options.rounds), *on_disk(options.rounds), *on_s3(options.rounds), digest()]

"""What a save costs: the same job, in the same processes, saving in different ways, interleaved.

Arms: `none` never saves; `tutorial` saves in the way of Ray's own FSDP2 tutorial (dcp.save into a temporary directory,
then a synchronous report, which copies); `tutorial-async` the same with Ray's asynchronous upload; `areal_ray` is ours;
the others are what PyTorch has (peers/savers.py), straight to the final place and without Ray hearing of it.
"""

import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointUploadMode, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from areal_ray.checkpoint import AsyncWriter, Catalog
from areal_ray.cluster.console import Console
from areal_ray.cluster.requests import requests_to
from areal_ray.config import Config, KeepConfig, load
from areal_ray.distributed import Ranks
from areal_ray.driver.connect import cluster
from areal_ray.engine import FSDPEngine
from areal_ray.run import RunDir
from areal_ray.storage import storage_at
from areal_ray.train.faults import Faults
from areal_ray.train.journal import Journal, retention
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from areal_ray.worker.session import RaySession

from . import report
from .arms import LARGER, has_standbys
from .bounds import BLOCKED, COMMITTED, PLAIN_WRITE, STALL
from .limits import plain_write
from .options import Options
from .peers.savers import MODES, AppState, Sync
from .steps import step_of

ROOT = Path(__file__).parents[2]
LENGTH = ["train.steps=1000000"]
STEPS, SAVE_AT = 24, (2, 10, 18)
ARMS = ("none", "tutorial", "tutorial-async", *MODES, "areal_ray")


class Tutorial:
    """dcp.save into a temporary directory on each worker, and a report that has Ray copy it."""

    def __init__(self, engine: FSDPEngine, mode: CheckpointUploadMode, copies: Path) -> None:
        self._engine, self._mode, self._copies = engine, mode, copies

    def save(self, step: int) -> None:
        folder = tempfile.mkdtemp()
        dcp.save({"app": AppState(self._engine.model, self._engine.optimizer)}, checkpoint_id=folder)
        asynchronous = self._mode is CheckpointUploadMode.ASYNC
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=self._mode,
            delete_local_checkpoint_after_upload=asynchronous,
        )
        if not asynchronous:
            shutil.rmtree(folder)

    def fence(self) -> None: ...

    def settle(self) -> None: ...

    def clean_up(self) -> None:
        """What Ray copied goes; its own num_to_keep would count, and delete, what areal_ray lets go by itself."""
        ray.train.get_all_reported_checkpoints()  # waits for what has not been copied yet
        if ray.train.get_context().get_world_rank() == 0:
            for path in filter(Path.is_dir, self._copies.glob("checkpoint_*")):
                shutil.rmtree(path)


class Torch:
    """One of PyTorch's own ways; only the last checkpoint stays."""

    def __init__(self, saver: Sync, folder: Path, ranks: Ranks) -> None:
        self._saver, self._folder, self._ranks = saver, folder, ranks
        self._written: list[Path] = []

    def save(self, step: int) -> None:
        self._written.append(self._folder / f"step-{step}")
        self._saver.save(str(self._written[-1]), step)

    def fence(self) -> None:
        self._saver.fence()

    def settle(self) -> None:
        self._saver.settle()

    def clean_up(self) -> None:
        if self._ranks.rank == 0:
            for path in self._written:
                shutil.rmtree(path)
        self._written = []


class Ours:
    """The parts of the real job, put together as its worker does."""

    def __init__(self, engine: FSDPEngine, ranks: Ranks, config: Config) -> None:
        run = RunDir(storage_at(config.run.storage_path).sub(config.run.name))
        self._path = Path(config.run.storage_path, config.run.name)
        requests = requests_to("bench", fast_restarts=True)
        self._run, self._session = run, RaySession(Faults([], run, ranks), ranks, requests, run.storage)
        background = Ranks(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
        writer = AsyncWriter(ranks, background)
        self.fence = writer.fence
        catalog = Catalog(run.storage)
        kept = retention(run, 1, lambda _: None, catalog, KeepConfig(last=2))
        journal = Journal(run if ranks.rank == 0 else None, 1, lambda _: None, kept)
        state = {"engine": engine.state}
        self._recover = RecoverHandler(catalog, state, writer, journal, 1, engine.describe(), ranks, SavePolicy())

    def save(self, step: int) -> None:
        dump = self._recover.save(step, {})
        assert dump is not None
        self._session.saving(dump, {})

    def settle(self) -> None:
        self._recover.wait()

    def on_disk(self) -> int:
        """Bytes of the files of the last checkpoint."""
        last = Path(self._path, self._run.events("saved")[-1]["checkpoint"])
        return sum(file.stat().st_size for file in last.iterdir())


def segment(engine: FSDPEngine, batch: dict[str, torch.Tensor], saver: Any, step: int) -> tuple[float, list[float]]:
    """Train STEPS steps from `step` on, with the saves; the seconds that took, and those blocked by each save."""
    stalls: list[float] = []

    def fence() -> None:
        at = time.perf_counter()
        saver.fence()
        if stalls:  # what is still copied of the save before
            stalls[-1] += time.perf_counter() - at

    wait_for_copy = fence if saver is not None else lambda: None
    dist.barrier()
    began = time.perf_counter()
    for i in range(STEPS):
        step_of(engine, batch, wait_for_copy)
        if saver is not None and i in SAVE_AT:
            dist.barrier()  # not the waiting for a slower rank, but the save
            at = time.perf_counter()
            saver.save(step + i + 1)
            stalls.append(time.perf_counter() - at)
    if saver is not None:
        saver.settle()
    dist.barrier()
    return time.perf_counter() - began, stalls


def measure(settings: dict) -> dict | None:
    """Runs in every worker; rank 0 returns what it measured."""
    config: Config = settings["config"]
    engine = FSDPEngine(config)
    engine.initialize()
    ranks = Ranks()
    generator = torch.Generator().manual_seed(ranks.rank)
    rows = config.train.global_batch_size // ranks.size
    ids = torch.randint(0, 256, (rows, config.train.seq_len), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    folder = Path(config.run.storage_path, config.run.name)
    savers = {
        "none": None,
        "tutorial": Tutorial(engine, CheckpointUploadMode.SYNC, folder),
        "tutorial-async": Tutorial(engine, CheckpointUploadMode.ASYNC, folder),
        **{
            name: Torch(m(engine.model, engine.optimizer), Path(config.run.storage_path), ranks)
            for name, m in MODES.items()
        },
        "areal_ray": Ours(engine, ranks, config),
    }
    own = sum(p.to_local().nbytes for p in engine.model.parameters())
    own += sum(
        (v.to_local() if hasattr(v, "to_local") else v).nbytes
        for s in engine.optimizer.state.values()
        for v in s.values()
    )
    arms = settings["arms"]
    times, blocked, plain = {a: [] for a in arms}, {a: [] for a in arms if a != "none"}, []
    step = on_disk = 0
    for round_number in range(settings["rounds"] + 1):  # the first one warms up
        for arm in Options.order(arms, round_number):
            saver = savers[arm]
            seconds, stalls = segment(engine, batch, saver, step)
            step += STEPS
            if isinstance(saver, Tutorial | Torch):  # what is still copied is not the next arm's; nor counted here
                saver.clean_up()
            elif isinstance(saver, Ours):
                on_disk = saver.on_disk()
            if round_number:
                times[arm].append(seconds)
                if saver is not None:
                    blocked[arm].append(statistics.median(stalls))
        if ranks.rank == 0:
            plain.append(plain_write(Path(config.run.storage_path), ranks.size * own))
        dist.barrier()
    staging = savers["areal_ray"]._recover._writer._capture._image.result()
    sizes = {"staging": staging.size, "own": own, "on_disk": on_disk}
    return {"segment": times, "blocked": blocked, "plain": plain[1:], **sizes}


def run(options: Options) -> list[dict]:
    """Measure on two workers of a cluster of its own; what `report.show` returned."""
    needed = ("none", "tutorial", "areal_ray")  # the tables are relative to them
    arms = [arm for arm in ARMS if arm in needed or not options.only or arm in options.only]
    with tempfile.TemporaryDirectory() as folder:
        where = [f"run.storage_path={folder}", "run.name=saves"]
        if has_standbys():
            where.append("cluster.standbys=off")  # nothing is started again here
        config = load(str(ROOT / "conf/experiments/tiny.yaml"), [*(options.model or LARGER), *LENGTH, *where])
        settings = {"config": config, "rounds": options.rounds, "arms": arms}
        with Console(), cluster(config):
            result = TorchTrainer(
                measure,
                train_loop_config=settings,
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(
                    name="saves",
                    storage_path=folder,
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            ).fit()
        found = result.return_value
        runs = RunDir(storage_at(folder).sub("saves"))
        saves = runs.events("saved")[len(SAVE_AT) :]
    return _tables(found, saves, saves[-1]["bytes"])


def _tables(found: dict, saves: list[dict], size: int) -> list[dict]:
    blocked = report.show(BLOCKED, "s", found["blocked"], "tutorial")
    stall = {
        arm: [
            (with_saves - without) / len(SAVE_AT)
            for with_saves, without in zip(times, found["segment"]["none"], strict=True)
        ]
        for arm, times in found["segment"].items()
        if arm != "none"
    }
    effective = report.show(STALL, "s", stall, "tutorial", paired=False)
    count = len(found["plain"])
    groups = [saves[i * len(SAVE_AT) : (i + 1) * len(SAVE_AT)] for i in range(count)]
    ours = [statistics.median(size / (s["total_s"] - s["blocked_s"]) for s in group) / 1e6 for group in groups]
    plain = [size / seconds / 1e6 for seconds in found["plain"]]
    rate = report.show(COMMITTED, "MB/s", {PLAIN_WRITE: plain, "areal_ray": ours}, PLAIN_WRITE, report.HIGHER)
    ratios = {
        "bytes on disk / bytes of the checkpoint": found["on_disk"] / size,
        "staging memory / the rank's own state": found["staging"] / found["own"],
    }
    sizes = {"bytes": size, "on_disk": found["on_disk"], "staging": found["staging"], "own": found["own"]}
    return [blocked, effective, rate, report.figures("what a checkpoint takes", **ratios, **sizes)]

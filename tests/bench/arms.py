"""What is compared: for each arm the command that trains the same model on the same data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_ray.config import ClusterConfig, load

from .launch import ROOT, Cluster, Job, run_folder
from .peers.common import Work

EXPERIMENT = "conf/experiments/tiny.yaml"
LARGER = [  # 20.7M parameters: 248 MB of state, so that a save is something
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1408",
    "model.config.num_hidden_layers=7",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=4",
    "train.seq_len=128",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
]
MODELS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "120M": (  # 1.4 GB of state
        "model.config.hidden_size=896",
        "model.config.intermediate_size=3136",
        "model.config.num_hidden_layers=11",
        "model.config.num_attention_heads=14",
        "model.config.num_key_value_heads=7",
        "train.seq_len=32",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
    ),
}
FOR_EVER = 1_000_000  # steps: until it is stopped
RESTARTS = "100000"
NAME = "ours"  # of areal_ray's run
NONE: Mapping[str, str] = {}
# Ray Train's own switches for noticing sooner, and for not waiting a minute for a group that cannot start; the driver's
# environment reaches its controller.
QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}


@dataclass(frozen=True)
class Task:
    """What an arm is to do.

    Args:
        steps: length of the run.
        every: steps between two saves; None: never.
        workers: ranks, or [min, max].
        overrides: of the experiment, model and sizes.
    """

    steps: int = FOR_EVER
    every: int | None = None
    workers: Any = 2
    overrides: tuple[str, ...] = ()

    def work(self, folder: Path) -> Work:
        config = load(str(ROOT / EXPERIMENT), self.overrides)
        most = self.workers if isinstance(self.workers, int) else self.workers[1]
        rows = config.train.global_batch_size // most
        assert rows <= config.train.micro_batch_size, "the peers do not accumulate gradients"
        return Work(
            folder=str(folder),
            model=config.model.config,
            seq_len=config.train.seq_len,
            rows=rows,
            steps=self.steps,
            every=self.every,
            lr=config.optim.lr,
            workers=self.workers,
        )

    @property
    def tokens(self) -> int:
        """Of one step, over all ranks."""
        config = load(str(ROOT / EXPERIMENT), self.overrides)
        return config.train.global_batch_size * config.train.seq_len


@dataclass(frozen=True)
class Arm:
    """Args:
    command: (path of the written Work, Task) -> what to run.
    on_ray: whether it needs a cluster.
    environment: variables of its own.
    """

    command: Callable[[str, Task], list[str]]
    on_ray: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def _torchrun(save: str) -> Arm:
    def command(work: str, task: Task) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={task.workers}"]
        return [sys.executable, *launcher, "--max-restarts", RESTARTS, *_module("torchrun_fsdp2"), work, save]

    # Restarted gloo groups hang on the keys of those before them in a store that they share (pytorch#135712).
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if save != "none" else {}
    return Arm(command, on_ray=False, environment=own_store)


def _module(name: str) -> list[str]:
    return ["-m", f"tests.bench.peers.{name}"]


def _ours(*more: str) -> Arm:
    def command(work: str, task: Task) -> list[str]:
        return [
            *(sys.executable, "-m", "tests.bench.ours", "--config", EXPERIMENT, *task.overrides),
            *(f"run.storage_path={Work.read(work).storage}", f"run.name={NAME}", f"train.steps={task.steps}"),
            f"cluster.num_workers={task.workers}",
            "cluster.max_failures=-1",
            f"checkpoint.every_steps={task.every or 'null'}",
            *("eval.every_steps=null", "optim.schedule=constant", "optim.warmup_steps=0"),  # as the peers
            # Without saves there is nothing that a step could be restored from.
            *(["checkpoint.memory_every_steps=null"] if task.every is None else []),
            *more,
        ]

    return Arm(command)


def _tracked() -> Arm:
    """areal_ray with every tracker that there is, each on this machine."""
    plain = _ours(
        "trackers=[{name: tensorboard}, {name: wandb, args: {mode: offline}}, {name: mlflow}, {name: trackio}]"
    )

    def command(work: str, task: Task) -> list[str]:
        return [*plain.command(work, task), f"cluster.env={{TRACKIO_DIR: {Work.read(work).storage}/trackio}}"]

    return Arm(command)


def has_standbys() -> bool:
    return "standbys" in {field.name for field in dataclasses.fields(ClusterConfig)}


def has_watchdog() -> bool:
    """Whether a worker that hangs is noticed at all."""
    return "watchdog" in {field.name for field in dataclasses.fields(ClusterConfig)}


def standbys_ready(job: Job) -> bool:
    """Whether areal_ray's spare processes, one for each of two workers, are there and warm."""
    ledger = job.folder / "storage" / NAME / "events.jsonl"
    text = ledger.read_text() if ledger.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return any(line["event"] == "standbys" and line["ready"] >= 2 for line in lines)


def _python(name: str, *options: str, environment: Mapping[str, str] = NONE) -> Arm:
    return Arm(lambda work, task: [sys.executable, *_module(name), work, *options], environment=environment)


ARMS: dict[str, Arm] = {
    "torchrun": _torchrun("none"),
    "torchrun-dcp": _torchrun("dcp"),
    "torchrun-async-thread": _torchrun("async-thread"),
    "torchrun-async-thread-best": _torchrun("async-thread-best"),
    "torchrun-async-process": _torchrun("async-process"),
    "torchrun-async-process-best": _torchrun("async-process-best"),
    "torchrun-full": _torchrun("full"),
    "tutorial": _python("ray_tutorial", "sync"),
    "tutorial-async": _python("ray_tutorial", "async"),
    "tutorial-best": _python("ray_tutorial", "best", environment=QUICK),
    "areal_ray": _ours(),
    "areal_ray-partners": _ours("checkpoint.memory_partner=true"),
}
if importlib.util.find_spec("accelerate"):
    ARMS["hf-ddp"] = _python("hf_trainer")
if has_standbys():
    ARMS["areal_ray-no-standbys"] = _ours("cluster.standbys=off")
if all(map(importlib.util.find_spec, ("tensorboard", "wandb", "mlflow", "trackio"))):
    ARMS["areal_ray-trackers"] = _tracked()


_MISSING = {
    "hf-ddp": "accelerate is not installed",
    "areal_ray-no-standbys": "this version has no cluster.standbys",
    "areal_ray-trackers": "not all of tensorboard, wandb, mlflow and trackio are installed",
}


def available(names: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """Those that can run here, and are wanted; says which are left out."""
    wanted = [name for name in names if not only or name in only]
    for name in wanted:
        if name not in ARMS:
            print(f"arm {name} is left out: {_MISSING[name]}")
    return [name for name in wanted if name in ARMS]


@contextmanager
def started(name: str, task: Task, address: str | None = None) -> Iterator[Job]:
    """The arm, running; on a cluster of its own unless one is given."""
    arm = ARMS[name]
    of_its_own = Cluster(2) if arm.on_ray and address is None else nullcontext()
    with run_folder() as folder, of_its_own as cluster:
        work = task.work(folder).write()
        where = {"RAY_ADDRESS": address or cluster.address} if arm.on_ray else {}
        job = Job(arm.command(work, task), folder, {**where, **arm.environment})
        job.cluster = cluster
        try:
            yield job
        finally:
            job.stop()

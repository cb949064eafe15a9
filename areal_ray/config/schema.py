"""The whole schema on one page: every key, its type, its default and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from areal_ray.config.data_schema import DataConfig, SourceConfig
from areal_ray.config.eval_schema import EvalConfig, ExportConfig
from areal_ray.config.model_schema import ModelConfig
from areal_ray.config.plugin import is_plugin
from areal_ray.config.types import Recomputed, StandbyCount, WorkerRange

EVALUATION = "eval/"  # before the name of a set among the corpora of a run


@dataclass(frozen=True)
class S3Config:
    """For a storage_path of s3://. What is not given comes from the AWS variables, profile files or machine roles."""

    endpoint: str | None = None  # URL of a server other than Amazon's
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)  # better left to the environment
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"  # the run directory's name; the same name and storage_path resume
    storage_path: str = "~/areal_ray"  # a path that every node sees, or s3://bucket/prefix; ${oc.env:NAME} works here
    s3: S3Config = field(default_factory=S3Config)
    private: bool = False  # the run directory is closed to other users (mode 0700); not for s3://
    seed: int = 0  # weights, order of the data and all randomness follow from it
    recover: Literal["auto", "resume", "fresh"] = "auto"  # if there is something · insist · refuse a used directory
    # Of data, run.seed, model.config, model.path, model.factory, objective (its frozen models).
    allow_changes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WatchdogConfig:
    """Limits after which a worker counts as stuck and is ended, so that the run goes on from its last checkpoint."""

    factor: float = 10.0  # so many times the usual time of a step, or of an evaluation's batch, without progress
    floor_s: float | None = None  # but at least so long; null: 60 with GPUs (a network's retries, a compiler), else 10
    connect_s: float = 120.0  # for the ranks to reach each other, before the model is built
    patience_s: float = 1800.0  # for all else: start, restore, the first step, saves (storage may be slow)


@dataclass(frozen=True)
class ClusterConfig:
    num_workers: Any = 2  # or [min, max]: as many as there is room for, more when machines come back
    use_gpu: bool = False
    resources_per_worker: dict[str, float] = field(default_factory=dict)  # default: one CPU, or one CPU and one GPU
    max_failures: int = -1  # before the run is given up; -1: no limit, but the same error twice at one step
    use_again: list[str] = field(default_factory=list)  # nodes that were left out, mended since
    watchdog: WatchdogConfig | None = field(default_factory=WatchdogConfig)  # null: none
    fast_restarts: Any = "auto"  # auto: by Ray's internals, if they are the known ones · off: by its public API
    standbys: Any = "auto"  # processes per node that wait for a restart: auto (one a worker), off, or a number
    template: bool = True  # one process per node imports everything, the others are forked from it: quick starts
    env: dict[str, str] = field(default_factory=dict)  # variables of all processes of the job, set before they import
    collective_timeout_s: float = 600.0  # longest wait of a rank for the others before it counts as failed


@dataclass(frozen=True)
class AdapterConfig:
    """A few parameters that are trained in a model whose own ones stay as they are, in memory and in no checkpoint."""

    name: str  # lora (by peft), or package.module:Class, an areal_ray.models.Adapter
    args: dict[str, Any] = field(default_factory=dict)  # lora: of peft.LoraConfig (r, lora_alpha, target_modules, ...)


@dataclass(frozen=True)
class ParameterGroupConfig:
    """Settings of the parameters whose names a regular expression is found in; the first group that matches counts."""

    pattern: str
    lr_scale: float = 1.0  # of the learning rate, whatever the schedule makes of it
    weight_decay: float | None = None  # null: as without a group
    freeze: bool = False  # not trained at all


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving averages of the weights: in the checkpoint, to be evaluated and exported on request."""

    decay: float = 0.999  # the first updates have less: after n of them at most (1 + n) / (10 + n)
    every_steps: int = 1  # one update after so many steps


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # or muon, adafactor, sgd, or package.module:function, called with parameter groups and args
    args: dict[str, Any] = field(default_factory=dict)  # all but adamw's, see areal_ray/engine/optim/build.py
    groups: list[ParameterGroupConfig] = field(default_factory=list)
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only; not on norms, biases
    clip_grad_norm: float | None = 1.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warm up, stable, then a linear decay
    warmup_steps: int = 0
    warmup_samples: int | None = None  # instead of warmup_steps
    warmup_epochs: float | None = None  # instead of warmup_steps
    decay_steps: int | None = None  # the decay of wsd, at the end; null: a tenth of the run
    decay_samples: int | None = None  # instead of decay_steps
    decay_epochs: float | None = None  # instead of decay_steps
    min_lr_ratio: float = 0.1  # where all but constant end, as a share of lr
    ema: EmaConfig | None = None  # averages of the weights, {} for the usual ones; as much memory as the weights


@dataclass(frozen=True)
class MeshConfig:
    replicate: int = 1  # copies of the sharded model (HSDP)
    shard: int = -1  # ranks that share one copy (FSDP); -1: all that the others leave
    tensor: int = 1  # ranks that compute one layer together (tensor parallelism), by the model's own plan


@dataclass(frozen=True)
class EngineConfig:
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Literal["float32", "bfloat16"] | None = None  # of the computation; null: bfloat16 on GPUs, else float32
    tf32: bool = False  # float32 matrix products with fewer bits of mantissa, on GPUs that can
    deterministic: bool = False  # the same bits each time on a GPU, too, for some speed
    reshard_after_forward: bool = True  # but for the last unit and the rest, with which the backward pass begins
    # Activations that are computed again in the backward pass instead of kept: none or false · full or true, of all
    # units · n, of every n-th one · selective, but for matrix products and attention
    activation_checkpointing: Any = False
    compile: bool = False  # torch.compile, each unit by itself
    offload: Literal["none", "all"] = "none"  # all: weights, gradients and optimizer in host memory, which steps there
    accumulate: Literal["auto", "sharded", "unsharded"] = "auto"  # how gradients of micro-batches add up on a rank

    @property
    def recomputed(self) -> Recomputed:
        """The units that activation_checkpointing means."""
        return Recomputed.parse(self.activation_checkpointing)


@dataclass(frozen=True)
class BadStepConfig:
    """A step whose loss or gradient norm is not finite, or whose loss is a spike: it never changes the weights."""

    on_bad: Literal["stop", "skip", "rollback"] = "stop"  # fail · leave its batch out · that, from the last checkpoint
    spike_factor: float | None = None  # a loss above so many times the median of the last good ones; null: no spikes
    spike_window: int = 20  # how many of the last good losses; before there are so many nothing is a spike
    max_bad_steps: int = 10  # left out in the life of the run; with the next one it stops
    lag: Literal[0, 1] = 0  # 1: decided on the device and recorded a step later, so that the host never waits for it


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100  # length of the run and of the learning-rate schedule; 0 as long as another unit says it
    samples: int | None = None  # instead of steps, so many sequences
    epochs: float | None = None  # instead of steps, so many times the data; the driver counts the steps
    stop_at: int | None = None  # end early, resumable; the schedule stays that of steps
    global_batch_size: int = 8  # sequences per optimizer step, whatever the number of workers
    micro_batch_size: int = 4  # sequences per forward pass of one rank
    seq_len: int = 256  # tokens
    bad_step: BadStepConfig = field(default_factory=BadStepConfig)
    skip_poison_steps: bool = False  # leave out a step at which the workers fail again and again, with its batch


@dataclass(frozen=True)
class KeepConfig:
    """Rules of retention: a checkpoint stays if any of them keeps it, and the newest good one always does."""

    last: int | None = None  # so many of the newest; null keeps all
    every_steps: int | None = None  # those of steps that this divides, for good
    best: int = 0  # so many of the best by metric
    metric: str = "held_out_loss"  # or loss, or another one of an evaluation, as held_out/<set>/loss
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class CheckpointConfig:
    every: Literal["auto"] | None = None  # auto: by what saves cost and how often the run fails, instead of the others
    every_steps: int | None = 50
    every_seconds: float | None = None
    every_epochs: int | None = None
    memory_every_steps: int | None = None  # copies in host memory (twice the state) that survive a killed worker
    memory_partner: bool = False  # each copy on another node as well (twice the state there), to survive a lost node
    async_save: bool = True  # training goes on while a process beside each rank writes
    when_busy: Literal["wait", "skip"] = "wait"  # if storage still writes the last one when the next is due
    max_failed_saves: int = 3  # in a row, after which the run stops
    keep: KeepConfig = field(default_factory=KeepConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    # language_modeling · sft: of answers alone · dpo: of preference pairs · distillation: from a teacher
    name: str = "language_modeling"  # or package.module:Class, an areal_ray.engine.Objective
    args: dict[str, Any] = field(
        default_factory=dict
    )  # of its class; areal_ray/engine/objectives has those named above


@dataclass(frozen=True)
class TrackerConfig:
    """A place for metrics beside the screen and metrics.jsonl."""

    name: str  # tensorboard, wandb, mlflow, trackio, or package.module:Class, with log, rewind and close
    args: dict[str, Any] = field(default_factory=dict)  # theirs, see areal_ray/train/trackers


@dataclass(frozen=True)
class LoggingConfig:
    every_steps: int = 10
    peak_tflops: float | None = None  # of a worker's device, for mfu; null: known by its name, for usual GPUs
    sample_ids: bool = False  # write the numbers of every global batch's sequences to samples.jsonl, to check order


@dataclass(frozen=True)
class Fault:
    """Something bad, on purpose: happens once per run, on `rank`, before `step` is computed (nan: to its loss)."""

    kind: Literal["sigkill", "sigstop", "sigsegv", "hang", "exception", "exit", "nan"]
    rank: int
    step: int


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig | None = None  # null: all of the model is trained
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig | None = None  # null: no exports but by `areal-ray ckpt export`
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    trackers: list[TrackerConfig] = field(default_factory=list)
    on_end: str | None = None  # package.module:name, called with result.json and the run directory; or a command
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Fill in what depends on another key, so that everybody sees it."""
        self._leave_steps_open()
        gpu, watchdog = self.cluster.use_gpu, self.cluster.watchdog
        if self.data.tokenizer is None:
            object.__setattr__(self, "data", replace(self.data, tokenizer=self._tokenizer))
        if self.engine.precision is None:
            object.__setattr__(self, "engine", replace(self.engine, precision="bfloat16" if gpu else "float32"))
        if watchdog is not None and watchdog.floor_s is None:
            limits = replace(watchdog, floor_s=60.0 if gpu else 10.0)
            object.__setattr__(self, "cluster", replace(self.cluster, watchdog=limits))

    def _leave_steps_open(self) -> None:
        """Take back lengths in steps that are given in another unit: what they come to, the data say."""
        train, optim = self.train, self.optim
        if train.steps and (train.samples, train.epochs) != (None, None):
            object.__setattr__(self, "train", replace(train, steps=0))
        if optim.warmup_steps and (optim.warmup_samples, optim.warmup_epochs) != (None, None):
            object.__setattr__(self, "optim", replace(optim, warmup_steps=0))
        if optim.decay_steps and (optim.decay_samples, optim.decay_epochs) != (None, None):
            object.__setattr__(self, "optim", replace(self.optim, decay_steps=None))

    @property
    def _tokenizer(self) -> str:
        """The one of the model, if it says which; the driver looks at what lies at that path."""
        model = self.model
        return model.path if model.path and not (model.config or model.factory) else "bytes"

    @cached_property
    def worker_range(self) -> WorkerRange:
        """The numbers of workers that cluster.num_workers allows."""
        return WorkerRange.parse(self.cluster.num_workers)

    @property
    def usable_sizes(self) -> list[int]:
        """The numbers of workers in that range that the mesh and the global batch can be shared by, ascending."""
        low, high = self.worker_range
        return [size for size in range(low, high + 1) if fits(self, size)]

    @property
    def evaluation_sets(self) -> dict[str, DataConfig]:
        """The data of each set of eval.sets by its name, as if it were alone; rows are made as those of training."""
        own = [each.name for each in fields(SourceConfig)]
        return {
            name: replace(self.data, mixture=[], **{key: getattr(each, key) for key in own})
            for name, each in self.eval.sets.items()
        }

    @property
    def corpora(self) -> dict[str, DataConfig]:
        """The data of everything that is prepared: what is trained on, and `eval/<name>` for each evaluation set.

        Sources of one's own, which make their rows themselves, are not among them.
        """
        sets = {f"{EVALUATION}{name}": data for name, data in self.evaluation_sets.items()}
        return {name: data for name, data in {**self.data.sources, **sets}.items() if not is_plugin(data.source)}

    @property
    def worker_resources(self) -> dict[str, float]:
        """The resources of one worker."""
        return {"CPU": 1, **({"GPU": 1} if self.cluster.use_gpu else {}), **self.cluster.resources_per_worker}

    def standbys(self, local_workers: int) -> int:
        """The number of standbys on a node that has so many workers."""
        return StandbyCount.parse(self.cluster.standbys).on(local_workers)

    @property
    def length(self) -> str:
        """The length of the run, as it is given."""
        train = self.train
        if train.steps:
            return f"{train.steps:,} steps"
        return f"{train.epochs:g} epochs" if train.epochs is not None else f"{train.samples:,} samples"

    @property
    def last_step(self) -> int:
        """The step at which this invocation ends; 0 as long as that is not known."""
        return self.train.steps if self.train.stop_at is None else self.train.stop_at


def fits(config: Config, workers: int) -> bool:
    """Whether the mesh can be laid over so many workers, and the global batch be shared evenly by them."""
    mesh = config.engine.mesh
    whole = mesh.replicate * mesh.tensor
    if workers % whole or (mesh.shard != -1 and workers != whole * mesh.shard):
        return False
    return config.train.global_batch_size % (workers // mesh.tensor) == 0

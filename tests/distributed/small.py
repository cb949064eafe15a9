"""What the tests of this tier share: a small model, uneven batches, looking into an engine, trying what fails."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from areal_ray.config import Config, load
from areal_ray.distributed import RankError
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import LanguageModeling, next_token_loss, predicted_tokens

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH, SEQ_LEN, VOCABULARY = 8, 32, 264
# Attended tokens of each row. On two ranks the second has rows 1, 3, 5, 7: its last micro-batch predicts nothing.
LENGTHS = (32, 5, 17, 3, 32, 9, 26, 1)
SMALL = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=128",
    "model.config.num_hidden_layers=2",
    "model.config.head_dim=16",
    f"train.seq_len={SEQ_LEN}",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "train.micro_batch_size=3",  # neither the 8 rows of one rank nor the 4 of two are a multiple
    "train.steps=4",
    "optim.lr=2e-3",
    "optim.warmup_steps=2",
    "optim.clip_grad_norm=0.5",  # below the norms of the first steps
    "cluster.collective_timeout_s=60",
)
# Every mode of the engine.
VARIANTS = {
    "plain": [],
    "hsdp": ["engine.mesh.replicate=2", "engine.mesh.shard=1"],
    "keep_gathered": ["engine.reshard_after_forward=false"],
    "recompute": ["engine.activation_checkpointing=true"],
    "tensor": ["engine.mesh.tensor=2"],
    "unclipped": ["optim.clip_grad_norm=null", "optim.schedule=constant"],
    "bfloat16": ["engine.precision=bfloat16"],
}


def small_config(*overrides: str, sizes: bool = True) -> Config:
    """The tiny experiment, smaller; without the sizes of its model when the model is another one."""
    small = [override for override in SMALL if sizes or not override.startswith("model.")]
    return load(str(ROOT / "conf/experiments/tiny.yaml"), [*small, *overrides])


def start_engine(*overrides: str, weights: bool = True) -> FSDPEngine:
    engine = FSDPEngine(small_config(*overrides))
    engine.initialize(weights=weights)
    return engine


def global_batch(seed: int) -> dict[str, torch.Tensor]:
    """Random tokens, right-padded: a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    mask = torch.arange(SEQ_LEN) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def local_batch(seed: int, engine: FSDPEngine | None = None) -> dict[str, torch.Tensor]:
    """This rank's rows of it; the engine knows which where there are tensor groups."""
    rank, size = (engine.dp_rank, engine.dp_size) if engine else (dist.get_rank(), dist.get_world_size())
    return {name: t[rank::size] for name, t in global_batch(seed).items()}


def train(engine: FSDPEngine, seed: int, fence: Callable[[], None] | None = None) -> dict[str, float]:
    """One step on the global batch of that seed; `fence` waits for copies of the state before it changes."""
    if fence is None:
        stats = engine.train_batch(local_batch(seed, engine), next_token_loss, predicted_tokens)
        return {name: float(value) for name, value in stats.items()}
    return one_step(engine, local_batch(seed, engine), fence)


def one_step(engine: FSDPEngine, batch: dict[str, torch.Tensor], fence: Callable[[], None]) -> dict[str, float]:
    """One step as the loop takes it."""
    result = engine.forward_backward(batch, LanguageModeling())
    fence()
    engine.optimizer_step()
    engine.lr_scheduler_step()
    return {"loss": float(result.loss), "grad_norm": float(result.grad_norm), "lr": result.lr}


def evaluate(engine: FSDPEngine, seed: int) -> dict[str, float]:
    stats = engine.eval_batch(local_batch(seed, engine), next_token_loss, predicted_tokens)
    return {name: float(value) for name, value in stats.items()}


def live(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    """The engine's own tensors, `model.<name>` and `optim.<name>.<key>`, sharded as they are."""
    # Through state_dict, before which FSDP2 takes back what a forward pass has left gathered.
    names: dict[torch.Tensor, str] = {}
    for name, parameter in engine.model.state_dict(keep_vars=True).items():
        names.setdefault(parameter, name)  # tied ones once
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, state in engine.optimizer.state.items():
        tensors |= {f"optim.{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


def snapshot(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    """Copies of all of them, whole, on the CPU. A collective."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone()
        for name, t in live(engine).items()
    }


def erase(engine: FSDPEngine) -> None:
    """Set weights and optimizer state to zero."""
    for tensor in live(engine).values():
        tensor.zero_()


def differing(a: dict[str, Any], b: dict[str, Any], only: str = "") -> list[str]:
    """Names of tensors that are not the same bit for bit, among those whose names begin with `only`."""
    names = {name for name in a.keys() | b.keys() if name.startswith(only)}
    return sorted(name for name in names if name not in a or name not in b or not same_bits(a[name], b[name]))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@dataclass(frozen=True)
class Outcome:
    """What became of something that was tried: the exception, and in a RankError the ranks at fault."""

    error: str = ""
    text: str = ""
    ranks: tuple[int, ...] = ()


FINE = Outcome()


def attempt(work: Callable[[], Any]) -> Outcome:
    try:
        work()
    except RankError as error:
        return Outcome("RankError", str(error), tuple(rank for rank, *_ in error.failures))
    except (Exception, CheckpointException) as error:  # noqa: BLE001  (which one it is, is what the tests are about)
        return Outcome(type(error).__name__, str(error))
    return FINE


@contextmanager
def disk_full(here: bool, limit: int = 20_000) -> Iterator[None]:
    """Where `here`, the kernel refuses to let any file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

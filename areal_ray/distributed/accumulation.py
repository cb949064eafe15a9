"""Gradient accumulation over a step's micro-batches: each rank holds its shard of the sum, or the whole of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import FSDPModule

from areal_ray.config import Config
from areal_ray.distributed.mesh import ParallelDims
from areal_ray.distributed.overlap import LateReduceScatter

Accumulate = Literal["sharded", "unsharded"]

LARGE_BYTES = 2**30  # of gradients on a rank, above which they are worth a reduce-scatter with every micro-batch


def choose(config: Config, parameters: Iterable[nn.Parameter], recorded: Accumulate | None = None) -> Accumulate:
    """How a run accumulates gradients: what the configuration says, or else a choice for the run's whole life.

    The two differ in the last bits, so `auto` depends on nothing that a restart may change: neither on how many workers
    there are now nor on their memory. It is `sharded` if a rank of the smallest group of workers that the run may
    shrink to has more than one micro-batch, and would hold more than LARGE_BYTES of unsharded float32 gradients.

    Args:
        config: cluster.num_workers, engine and the sizes in train are read.
        parameters: of the model; those of a DTensor count in full.
        recorded: the choice of the checkpoint that the run goes on from.

    Raises:
        ValueError: if this torch cannot do what the configuration says.
    """
    able = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
    if config.engine.accumulate == "sharded" and not able:
        raise ValueError("engine.accumulate=sharded needs torch 2.13 or newer; this one can do unsharded only")
    if config.engine.accumulate != "auto":
        return config.engine.accumulate
    if not able:
        return "unsharded"
    if recorded is not None:
        return recorded
    if not config.usable_sizes:  # of a job under torchrun, which has other workers
        return "unsharded"
    tensor = config.engine.mesh.tensor
    rows = config.train.global_batch_size // (config.usable_sizes[0] // tensor)
    elements = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    large = 4 * elements // tensor > LARGE_BYTES
    return "sharded" if rows > config.train.micro_batch_size and large else "unsharded"


def reduce_after(model: Any, late: LateReduceScatter, how: Accumulate, first: bool, last: bool) -> None:
    """Set what FSDP does with the gradients of the backward pass that comes next.

    `unsharded`: they are summed on the rank, whole and in float32, and reduced with the last micro-batch. `sharded`:
    they are reduce-scattered with every micro-batch, and each rank sums its shard; with replicas of the model (HSDP)
    the sums are all-reduced once, with the last. What a rank does not use has a gradient of zero there, not none. With
    a single micro-batch both are the same, bit for bit, if every parameter is used.

    Args:
        model: on which `fully_shard` was called.
        late: its reductions.
        how: of the run.
        first, last: whether it is the first, the last micro-batch of the step.
    """
    model.set_requires_gradient_sync(how == "sharded" or last)
    if how == "sharded":
        # Ranks may use different parameters in one micro-batch (experts, branches), and each reduces what it has used.
        model.set_reduce_scatter_unused_params(True)
        model.set_requires_all_reduce(last)
    # FSDP adds to the sum as soon as the reduce-scatter returns, and it must be there then.
    late.at_once = how == "sharded" and not (first and last)


def finish(model: nn.Module, late: LateReduceScatter, how: Accumulate, micro_batches: int, dims: ParallelDims) -> None:
    """Wait for the gradients of a step after its last backward pass.

    Args:
        model, late, how: as for `reduce_after`.
        micro_batches: of this step.
        dims: of the mesh.

    Raises:
        RuntimeError: if a parameter may have gradients that the last micro-batch has not all-reduced, as it was not
            used there: FSDP would add them to those of the next step.
    """
    late.wait()
    if how == "sharded" and micro_batches > 1 and "replicate" in dims.sizes():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                text = "has no gradient after the last micro-batch; with engine.mesh.replicate every one needs it there"
                raise RuntimeError(f"{name} {text}, or engine.accumulate=unsharded")

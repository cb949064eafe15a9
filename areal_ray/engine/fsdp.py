"""FSDP2 (torch.distributed.fsdp.fully_shard): the engine that trains, saves and loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from areal_ray.config import Config, plugin
from areal_ray.distributed import Ranks, accumulation
from areal_ray.distributed.mesh import ParallelDims, init_distributed
from areal_ray.engine import adapters, first_weights, hidden, save_load
from areal_ray.engine.base import EvalResult, SaveLoadMeta, StepResult, finite
from areal_ray.engine.metric_sums import MetricSums
from areal_ray.engine.objectives import (
    Batch,
    FrozenModel,
    FunctionObjective,
    LossFn,
    LossWeightFn,
    Objective,
    split,
    text_inputs,
)
from areal_ray.engine.optim import LrSchedule, build_optimizer, clip_gradients, gradient_norm, skips_on_device
from areal_ray.engine.reproducibility import reseed, set_process_switches
from areal_ray.engine.scalars import positive_or_one, scalar_on
from areal_ray.engine.sharded_model import ShardedModel
from areal_ray.engine.state import DCPState, plain_group_values


class FSDPEngine:
    """A TrainEngine on FSDP2. Needs a launcher that sets the usual variables (torchrun, Ray Train) or none (one rank).

    Args:
        config: model, optim, engine and the sizes in train are read.
        device: "cpu" or "cuda"; None takes the GPU where there is one.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, device: str | None = None) -> None:
        set_process_switches(config.engine)  # here already: before anybody touches the device
        self._config, self._kind = config, device
        self._schedule = LrSchedule(config.optim, config.train.steps)
        self._owns_group = False
        self._in_step = False  # whether there are gradients that no step has used yet
        self._grad_norm: torch.Tensor | None = None  # their norm

    def initialize(
        self,
        weights: bool = True,
        references: Sequence[str] = (),
        entering: Callable[[str], None] = lambda _: None,
        accumulate: accumulation.Accumulate | None = None,
        loss: hidden.Loss | None = None,
        base: str | None = None,
    ) -> None:
        """Join the process group, build the model on the meta device, shard it, give it memory and first values.

        Args:
            weights: False leaves parameters undefined, for when a checkpoint is loaded next.
            references: names of frozen models beside it, each with the first weights; see `Objective.references`.
            entering: told of the phase that begins: "connect ..." for each group of ranks, then "build".
            accumulate, loss: what the checkpoint says that is loaded next; None: there is none. See `choose` of both.
            base: fingerprint of the base beneath its adapter, if it must be the same now; None: it need not.

        Raises:
            RuntimeError: if ranks do not reach each other and are told so; says in which dimension of the mesh.
            RankError: on every rank, if weights cannot be read from model.path.
            ValueError: on every rank, if they are those of another model.
            ConfigError: on every rank, if the base is another one.
        """
        config = self._config
        self._owns_group = not dist.is_initialized()
        limit_s = config.cluster.collective_timeout_s
        self.device = init_distributed(limit_s, self._kind, entering)
        self.dims = ParallelDims.build(config.engine.mesh, self.device, limit_s, entering)
        self._ranks = Ranks()
        entering("build")
        model = first_weights.settle(config.model, weights or bool(references or config.adapter), self._ranks)
        config = self._config = replace(config, model=model)
        self._sharded = self._build()
        self.accumulate = accumulation.choose(config, self.model.parameters(), accumulate)
        self.loss = hidden.choose(config, self._sharded.vocabulary, self._sharded.needs_logits, loss)
        if weights:
            self._sharded.init_weights()
        else:
            self._sharded.init_buffers()
        adapters.check_base(config, self._sharded.base, base)
        self.optimizer = build_optimizer(self.model, config.optim, restored=not weights)
        own = plugin.is_plugin(config.optim.name)
        self._group_values = plain_group_values(self.optimizer) if own else None
        self._references = {name: self._reference() for name in references}

    def _build(self) -> ShardedModel:
        return ShardedModel(self._config, self.dims, self.device, self._ranks)

    def _reference(self) -> FrozenModel:
        """The model with its first weights. Beneath an adapter these are still there, and nothing is held twice."""
        if self._sharded.adapted is not None:
            return self._sharded.without_adapter
        reference = self._build()
        reference.init_weights()
        reference.module.requires_grad_(False)
        return reference.frozen

    def destroy(self) -> None:
        """Give back model, optimizer and the process group, if this engine made it; it cannot be used afterwards."""
        for name in ("_sharded", "_references", "optimizer"):
            self.__dict__.pop(name, None)
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False

    @property
    def model(self) -> nn.Module:
        return self._sharded.module

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters in all, and of those that are trained."""
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)

    @property
    def shard_units(self) -> list[nn.Module]:
        """Modules that are gathered and computed as one, in the order of the model."""
        return self._sharded.units

    @property
    def dp_rank(self) -> int:
        return self.dims.batch_rank

    @property
    def dp_size(self) -> int:
        return self.dims.batch_size

    @property
    def state(self) -> DCPState:
        sharded = self._sharded
        return DCPState(sharded.module, self.optimizer, self._schedule, True, self._group_values, sharded.adapted)

    @property
    def lr(self) -> float:
        return self._schedule.lr(self._config.optim.lr)

    @property
    def skips_on_device(self) -> bool:
        return skips_on_device(self.optimizer)

    def describe(self) -> dict[str, Any]:
        mesh = self.dims.sizes()
        said = {"world_size": self._ranks.size, "mesh": mesh, "accumulate": self.accumulate, "loss": self.loss}
        if self._sharded.base is None:
            return said
        return {**said, "adapter": adapters.described(self._config, self._sharded.base, *self.parameters)}

    def train(self) -> None:
        """Put the model into training mode; `forward_backward` does so itself."""
        self.model.train()

    def eval(self) -> None:
        """Put the model into evaluation mode; `evaluate` and `forward` do so themselves."""
        self.model.eval()

    def forward_backward(self, batch: Batch, objective: Objective) -> StepResult:
        if self._in_step:
            raise RuntimeError("the gradients of another batch are there: optimizer_step or skip_step comes first")
        self._in_step = True
        self.train()
        reseed(self._config.run.seed, self._schedule.step, self.dp_rank)
        micro_batches = self._split(batch)
        weights = [self._weight(objective, micro) for micro in micro_batches]
        total = torch.stack(weights).sum()
        summed = dist.all_reduce(total, group=self.dims.batch_group, async_op=True)
        loss_sum, metrics = torch.zeros((), device=self.device), MetricSums(objective.metrics, self.device)
        for micro, weight in zip(micro_batches, weights, strict=True):
            first, last = micro is micro_batches[0], micro is micro_batches[-1]
            accumulation.reduce_after(self.model, self._sharded.late, self.accumulate, first, last)
            prepared = self._prepared(objective, micro)
            output = self._output(objective, prepared)
            summed.wait()
            mean, values = objective.loss(output, prepared)
            loss = mean * (weight / positive_or_one(total))  # without a token to predict nothing changes
            # FSDP averages over the parts of the batch; the mean here is over the weights of all of them.
            (loss * self.dp_size).backward()
            loss_sum += loss.detach()
            metrics.add(values, weight)
        accumulation.finish(self.model, self._sharded.late, self.accumulate, len(micro_batches), self.dims)
        summed = dist.all_reduce(loss_sum, group=self.dims.batch_group, async_op=True)
        grad_norm = gradient_norm(self.model.parameters())
        summed.wait()
        if not self.dims.only_shards:  # groups may differ in the last bit of what they sum, and must decide alike
            numbers = torch.stack([loss_sum, grad_norm])
            dist.broadcast(numbers, src=0)
            loss_sum, grad_norm = numbers.unbind()
        self._grad_norm = grad_norm
        return StepResult(loss_sum, grad_norm, self.lr, metrics.means(self.dims.batch_group))

    def optimizer_step(self, refused: torch.Tensor | None = None) -> None:
        assert self._grad_norm is not None, "forward_backward comes first"
        clip_gradients(self.model.parameters(), self._config.optim.clip_grad_norm, self._grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule.lr(group["initial_lr"])
        if refused is None:
            self.optimizer.step()
        else:
            self.optimizer.found_inf = refused  # type: ignore[attr-defined]  # see optim.skips_on_device
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.skip_step()

    def skip_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._grad_norm, self._in_step = None, False

    def lr_scheduler_step(self) -> None:
        self._schedule.step += 1

    def train_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        result = self.forward_backward(batch, FunctionObjective(loss_fn, loss_weight_fn))
        accepted = finite(*result.numbers())
        if accepted:
            self.optimizer_step()
        else:
            self.skip_step()
        self.lr_scheduler_step()
        return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "skipped": not accepted}

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> EvalResult:
        self.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        metrics = MetricSums(objective.metrics, self.device)
        for micro in self._split(batch):
            weight, prepared = self._weight(objective, micro), self._prepared(objective, micro)
            mean, values = objective.loss(self._output(objective, prepared), prepared)
            sums += torch.stack([mean.double() * weight, weight.double()])
            metrics.add(values, weight)
        dist.all_reduce(sums, group=self.dims.batch_group)
        self._sharded.reshard()
        return EvalResult(sums[0] / sums[1], sums[1], metrics.means(self.dims.batch_group))

    def eval_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        result = self.evaluate(batch, FunctionObjective(loss_fn, loss_weight_fn))
        return {"loss": result.loss, "weight": result.weight}

    def forward(self, batch: Batch) -> torch.Tensor:
        return torch.cat([self._sharded.frozen(text_inputs(micro)) for micro in self._split(batch)])

    def save(self, meta: SaveLoadMeta) -> None:
        """Save to a directory that all ranks see; its parents are made.

        Raises:
            FileExistsError: as a RankError on every rank, if a `dcp` save finds something in it.
            RankError: on every rank, if one of them could not write.
        """
        save_load.save_engine(meta, self._config, self.state, self.describe(), self._ranks)

    def load(self, meta: SaveLoadMeta) -> None:
        """Load what `save` wrote, at any world size.

        Raises:
            RankError: on every rank, if it is damaged.
            ValueError: if it is of another model, or has no optimizer and one is asked for.
        """
        save_load.load_engine(meta, self._config, self.state, self._ranks)

    def _split(self, batch: Batch) -> list[Batch]:
        return split(batch, self._config.train.micro_batch_size, self.device)

    @torch.no_grad()
    def _prepared(self, objective: Objective, micro: Batch) -> Batch:
        return objective.prepare(micro, self._references)

    def _output(self, objective: Objective, prepared: Batch) -> torch.Tensor | hidden.Hidden:
        forward = self._sharded.hidden if self.loss == "chunked" and objective.takes_hidden else self._sharded
        return forward(objective.model_inputs(prepared))

    def _weight(self, objective: Objective, micro: Batch) -> torch.Tensor:
        return scalar_on(self.device, objective.weight(micro)).float()

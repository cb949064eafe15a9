"""FSDP2 (torch.distributed.fsdp.fully_shard): the engine that trains, saves and loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from areal_ray import models
from areal_ray.config import Config, ModelConfig, plugin
from areal_ray.distributed import Ranks, accumulation
from areal_ray.distributed.mesh import ParallelDims, init_distributed, leave_distributed
from areal_ray.engine import adapters, first_weights, hidden, save_load
from areal_ray.engine.base import EvalResult, SaveLoadMeta, StepResult, finite
from areal_ray.engine.frozen import FrozenShards
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
from areal_ray.engine.optim import (
    LrSchedule,
    WeightAverages,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    skips_on_device,
)
from areal_ray.engine.reproducibility import reseed, set_process_switches
from areal_ray.engine.scalars import positive_or_one, scalar_on
from areal_ray.engine.sharded_model import ShardedModel
from areal_ray.engine.state import DCPState, plain_group_values


class FSDPEngine:
    """A TrainEngine on FSDP2. Needs a launcher that sets the usual variables (torchrun, Ray Train) or none (one rank).

    Args:
        config: model, optim, engine and the sizes in train are read.
        device: "cpu" or "cuda"; None takes the GPU where there is one.

    Raises:
        ValueError: if the length of the run is not known in steps.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, device: str | None = None) -> None:
        set_process_switches(config.engine)  # here already: before anybody touches the device
        self._config, self._kind = config, device
        if not config.train.steps:
            text = f"how many steps {config.length} are the data say: areal_ray.config.in_steps(config, len(data))"
            raise ValueError(text)
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
        reference_models: Mapping[str, ModelConfig] = MappingProxyType({}),
        base: str | None = None,
        trains: bool = True,
    ) -> None:
        """Join the process group, build the model on the meta device, shard it, give it memory and first values.

        Args:
            weights: False leaves parameters undefined, for when a checkpoint is loaded next.
            references: names of frozen models beside it, each with the first weights; see `Objective.references`.
            entering: told of the phase that begins: "connect ..." for each group of ranks, then "build".
            accumulate, loss: what the checkpoint says that is loaded next; None: there is none. See `choose` of both.
            reference_models: those of the frozen models that are another one; see `Objective.reference_models`.
            base: fingerprint of the base beneath its adapter, if it must be the same now; None: it need not.
            trains: False leaves the optimizer out, with two thirds of the memory: the model is only evaluated.

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
        if trains:
            self.optimizer = build_optimizer(
                self.model, config.optim, not weights, self.dims.mesh, config.engine.precision or "float32"
            )
        own = trains and plugin.is_plugin(config.optim.name)
        self._averages = WeightAverages(self.model, config.optim.ema) if config.optim.ema is not None else None
        if weights and self._averages is not None:
            self._averages.reset()
        self._group_values = plain_group_values(self.optimizer) if own else None
        self._fingerprints: dict[str, str] = {}  # of the frozen models
        self._references = {name: self._reference(name, reference_models.get(name)) for name in references}

    def _build(self) -> ShardedModel:
        return ShardedModel(self._config, self.dims, self.device, self._ranks)

    def _reference(self, name: str, model: ModelConfig | None) -> FrozenModel:
        """The run's model with its first weights, or another one with its own.

        Beneath an adapter the first weights are still there, and nothing is held twice.
        """
        chunked = self.loss == "chunked"
        if model is None and self._sharded.base is not None:
            self._fingerprints[name] = self._sharded.base["fingerprint"]
            return FrozenShards(self._sharded, chunked, self._sharded.base_alone)
        optim = replace(self._config.optim, groups=[])  # nothing of it is trained
        if model is not None:
            model = first_weights.settle(model, True, self._ranks)
        config = replace(self._config, model=model or self._config.model, adapter=None, optim=optim)
        reference = ShardedModel(config, self.dims, self.device, self._ranks)
        reference.init_weights()
        reference.module.requires_grad_(False)
        self._fingerprints[name] = models.fingerprint(reference.module)
        return FrozenShards(reference, chunked)

    def destroy(self) -> None:
        """Give back model, optimizer and the process group, if this engine made it; it cannot be used afterwards."""
        for name in ("_sharded", "_references", "optimizer", "_averages"):
            self.__dict__.pop(name, None)
        if self._owns_group:
            leave_distributed()
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
        sharded, own = self._sharded, self._group_values
        return DCPState(sharded.module, self.optimizer, self._schedule, True, own, sharded.adapted, self._averages)

    @property
    def weights(self) -> DCPState:
        """The model alone; beneath an adapter what is trained of it, as that is in checkpoints."""
        return DCPState(self.model, adapted=self._sharded.adapted)

    @property
    def lr(self) -> float:
        return self._schedule.lr(self._config.optim.lr)

    @property
    def skips_on_device(self) -> bool:
        return skips_on_device(self.optimizer)

    @property
    def references(self) -> dict[str, str]:
        """Fingerprints of the frozen models, by name, also of those that were let go."""
        return dict(self._fingerprints)

    def describe(self) -> dict[str, Any]:
        mesh = self.dims.sizes()
        said: dict[str, Any] = {"world_size": self._ranks.size, "mesh": mesh}
        said |= {"accumulate": self.accumulate, "loss": self.loss}
        if self._fingerprints:
            said["references"] = self.references
        if self._sharded.base is not None:
            said["adapter"] = adapters.described(self._config, self._sharded.base, *self.parameters)
        return said

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
            prepared = self.ask(micro, objective)
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
        grad_norm = gradient_norm(self.model.parameters(), self.device)
        summed.wait()
        if not self.dims.only_shards:  # groups may differ in the last bit of what they sum, and must decide alike
            numbers = torch.stack([loss_sum, grad_norm])
            dist.broadcast(numbers, src=0)
            loss_sum, grad_norm = numbers.unbind()
        self._grad_norm = grad_norm
        return StepResult(loss_sum, grad_norm, self.lr, metrics.means(self.dims.batch_group))

    def optimizer_step(self, refused: torch.Tensor | None = None) -> None:
        assert self._grad_norm is not None, "forward_backward comes first"
        if refused is not None and self._config.engine.offload == "all":
            refused = refused.cpu()  # torch's own copy to where the weights are would not be waited for
        clip_gradients(self.model.parameters(), self._config.optim.clip_grad_norm, self._grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule.lr(group["initial_lr"])
        if refused is None:
            self.optimizer.step()
        else:
            self.optimizer.found_inf = refused  # type: ignore[attr-defined]  # see optim.skips_on_device
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        if self._averages is not None:
            self._averages.update(self._schedule.step + 1, refused)
        self.skip_step()

    def skip_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._grad_norm, self._in_step = None, False

    def lr_scheduler_step(self) -> None:
        self._schedule.step += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self._averages is not None, "optim.ema is not set"
        self._sharded.reshard()
        with self._averages.in_place():
            yield

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
            weight, prepared = self._weight(objective, micro), self.ask(micro, objective)
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

    @torch.no_grad()
    def next_logits(self, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        self.eval()
        found = []
        for micro in self._split({"input_ids": input_ids, "last": last}):
            inputs, places = text_inputs(micro), micro["last"]
            if self.loss == "chunked":
                found.append(self._sharded.hidden(inputs).logits_at(places).float())
            else:
                logits = self._sharded(inputs)
                found.append(logits[torch.arange(len(places), device=self.device), places].float())
        self._sharded.reshard()
        return torch.cat(found)

    @torch.no_grad()
    def ask(self, batch: Batch, objective: Objective) -> Batch:
        """A micro-batch with what the frozen models say of it; a collective."""
        return objective.prepare(batch, self._references)

    def release_references(self) -> None:
        """Let go of the frozen models, and of their memory, when nobody asks them any more."""
        self._references = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

    def _output(self, objective: Objective, prepared: Batch) -> torch.Tensor | hidden.Hidden:
        forward = self._sharded.hidden if self.loss == "chunked" and objective.takes_hidden else self._sharded
        return forward(objective.model_inputs(prepared))

    def _weight(self, objective: Objective, micro: Batch) -> torch.Tensor:
        return scalar_on(self.device, objective.weight(micro)).float()

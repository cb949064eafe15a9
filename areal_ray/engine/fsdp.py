"""FSDP2 (torch.distributed.fsdp.fully_shard): the engine that trains, saves and loads."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from areal_ray import models
from areal_ray.checkpoint import load, save
from areal_ray.config import Config
from areal_ray.distributed import Ranks
from areal_ray.distributed.mesh import build_mesh, data_parallel_group, init_distributed
from areal_ray.distributed.overlap import overlap
from areal_ray.distributed.parallelize import parallelize
from areal_ray.engine.base import SaveLoadMeta, finite
from areal_ray.engine.objectives import Batch, LossFn, LossWeightFn
from areal_ray.engine.optim import LrSchedule, build_optimizer, clip_grad_norm
from areal_ray.engine.state import DCPState
from areal_ray.models import hf_weights
from areal_ray.storage import LocalStorage


class FSDPEngine:
    """A TrainEngine on FSDP2. Needs a launcher that sets the usual variables (torchrun, Ray Train) or none (one rank).

    Args:
        config: model, optim, engine and the sizes in train are read.
        device: "cpu" or "cuda"; None takes the GPU where there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, device: str | None = None) -> None:
        self._config, self._kind = config, device
        self._schedule = LrSchedule(config.optim, config.train.steps)
        # called before the weights change, to wait for copies of them
        self.before_update: Callable[[], None] = lambda: None
        # (loss, gradient norm), equal on all ranks -> whether the weights may change
        self.accept: Callable[[float, float], bool] = finite

    def initialize(self, weights: bool = True) -> None:
        """Join the process group, build the model on the meta device, shard it, give it memory and first values.

        Args:
            weights: False leaves parameters undefined, for when a checkpoint is loaded next.

        Raises:
            RankError: on every rank, if weights cannot be read from model.path.
            ValueError: on every rank, if they are those of another model.
        """
        config = self._config
        self.device = init_distributed(config.cluster.collective_timeout_s, self._kind)
        self.mesh = build_mesh(config.engine.mesh, self.device, config.cluster.collective_timeout_s)
        self._dp_group = data_parallel_group(self.mesh)
        self.model = models.build_model(config.model)
        parallelize(self.model, models.shard_units(self.model, config.model.shard_units), self.mesh, config.engine)
        self._late = overlap(self.model, self.mesh)
        models.materialise(self.model, self.device)
        self._ranks = Ranks()
        if weights and not config.model.path:
            models.init_weights(self.model, config.run.seed)
        else:
            models.init_buffers(self.model)
        if weights and config.model.path:
            self._load_pretrained(config.model.path)
        self.optimizer = build_optimizer(self.model, config.optim)

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self._dp_group)

    @property
    def dp_size(self) -> int:
        return dist.get_world_size(self._dp_group)

    @property
    def state(self) -> DCPState:
        return DCPState(self.model, self.optimizer, self._schedule)

    def train_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        self.model.train()
        reseed(self._config.run.seed, self._schedule.step, self.dp_rank)
        micro_batches = self._split(batch)
        weights = [loss_weight_fn(micro).to(self.device, torch.float32) for micro in micro_batches]
        total = torch.stack(weights).sum()
        summed = dist.all_reduce(total, group=self._dp_group, async_op=True)
        loss_sum = torch.zeros((), device=self.device)
        for micro, weight in zip(micro_batches, weights, strict=True):
            # Gradients are summed locally and leave the rank once, with the last micro-batch.
            self.model.set_requires_gradient_sync(micro is micro_batches[-1])  # type: ignore[operator]
            logits = self._logits(micro)
            summed.wait()
            # A batch without a token to predict changes nothing.
            loss = loss_fn(logits, micro) * (weight / torch.where(total > 0, total, 1.0))
            # FSDP averages over the parts of the batch; the mean here is over the weights of all of them.
            (loss * self.dp_size).backward()
            loss_sum += loss.detach()
        self._late.wait()
        summed = dist.all_reduce(loss_sum, group=self._dp_group, async_op=True)
        grad_norm = clip_grad_norm(self.model.parameters(), self._config.optim.clip_grad_norm)
        lr = self._schedule.lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        summed.wait()
        accepted = self.accept(*torch.stack([loss_sum, grad_norm]).tolist())  # waits for the device, once a step
        if self._ranks.size > self.dp_size:  # ranks of one tensor group may differ in the last bit of what they sum
            accepted = bool(self._ranks.broadcast_int(accepted))
        if accepted:
            self.before_update()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._schedule.step += 1
        return {"loss": loss_sum, "grad_norm": grad_norm, "lr": lr, "skipped": not accepted}

    def skip_batch(self) -> dict[str, Any]:
        lr = self._schedule.lr()
        self._schedule.step += 1
        nothing = torch.full((), torch.nan, device=self.device)
        return {"loss": nothing, "grad_norm": nothing, "lr": lr, "skipped": True}

    @torch.no_grad()
    def eval_batch(self, batch: Batch, loss_fn: LossFn, loss_weight_fn: LossWeightFn) -> dict[str, Any]:
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self._split(batch):
            weight = loss_weight_fn(micro).to(self.device)
            sums += torch.stack([loss_fn(self._logits(micro), micro).double() * weight, weight.double()])
        dist.all_reduce(sums, group=self._dp_group)
        self._reshard()
        return {"loss": sums[0] / sums[1], "weight": sums[1]}

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        logits = torch.cat([self._logits(micro) for micro in self._split(batch)])
        self._reshard()
        return logits

    def save(self, meta: SaveLoadMeta) -> None:
        """Save to a directory that all ranks see.

        Raises:
            RankError: on every rank, if one of them could not write.
        """
        directory = LocalStorage(meta.path)
        if meta.weight_format == "dcp":
            state = self.state if meta.with_optim else DCPState(self.model)
            save(directory, {"engine": state}, self.describe(), self._ranks)
            return
        self._ranks.on_rank_zero(lambda: hf_weights.prepare(directory.location))
        self._ranks.all_or_raise(lambda: hf_weights.save_weights(directory.location, hf_weights.weights_of(self.model)))
        if (architecture := models.architecture(self._config.model)) is not None:
            self._ranks.on_rank_zero(
                lambda: directory.replace("config.json", json.dumps(architecture, indent=2).encode())
            )
        if meta.with_optim:
            save(directory.sub("optim"), {"engine": self._optim_state()}, self.describe(), self._ranks)

    def load(self, meta: SaveLoadMeta) -> None:
        """Load what `save` wrote, at any world size.

        Raises:
            RankError: on every rank, if it is damaged.
            ValueError: if it is of another model, or holds an optimizer and none is asked for, or the other way round.
        """
        directory = LocalStorage(meta.path)
        if meta.weight_format == "dcp":
            state = self.state if meta.with_optim else DCPState(self.model)
            load(directory, {"engine": state}, self._ranks)
            return
        hf_weights.load_weights(directory.location, self.model, self._ranks)
        if meta.with_optim:
            load(directory.sub("optim"), {"engine": self._optim_state()}, self._ranks)

    def _load_pretrained(self, path: str) -> None:
        others = int(os.environ.get("LOCAL_RANK", "0")) > 0
        # One download per machine; the others then find it.
        self._ranks.all_or_raise(lambda: others or hf_weights.resolve(path))
        here = self._ranks.all_or_raise(lambda: hf_weights.resolve(path))[self._ranks.rank]
        hf_weights.load_weights(here, self.model, self._ranks)

    def _optim_state(self) -> DCPState:
        return DCPState(self.model, self.optimizer, self._schedule, weights=False)

    def describe(self) -> dict[str, Any]:
        """World size and mesh, for the manifest."""
        sizes = dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))
        return {"world_size": self._ranks.size, "mesh": sizes}

    def _split(self, batch: Batch) -> list[Batch]:
        size = self._config.train.micro_batch_size
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        rows = len(next(iter(on_device.values())))
        return [{name: t[i : i + size] for name, t in on_device.items()} for i in range(0, rows, size)]

    def _logits(self, batch: Batch) -> torch.Tensor:
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output if isinstance(output, torch.Tensor) else output.logits

    def _reshard(self) -> None:
        """Without a backward pass FSDP may leave parameters gathered, and a save would find these in their place."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def reseed(seed: int, step: int, dp_rank: int) -> None:
    """Make all randomness of a step a function of (seed, step, data-parallel rank), so that none needs to be saved.

    The ranks of a tensor group draw the same: what they hold whole, they must drop out alike. (So heads at the same
    place in two ranks' parts have the same attention dropout.)
    """
    value = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{dp_rank}".encode()).digest()[:8], "big") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)

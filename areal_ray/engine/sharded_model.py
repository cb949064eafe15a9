"""A model laid over a mesh: built, sharded, given its weights, and run forward. Without an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from areal_ray import models
from areal_ray.config import Config
from areal_ray.distributed import Ranks
from areal_ray.distributed.mesh import ParallelDims
from areal_ray.distributed.overlap import overlap
from areal_ray.distributed.parallelize import parallelize
from areal_ray.engine import first_weights
from areal_ray.engine.hidden import Hidden
from areal_ray.engine.optim import freeze
from areal_ray.models import hf_weights
from areal_ray.models.adapters import Fingerprint, quick_fingerprint
from areal_ray.models.lazy_tensor import Box
from areal_ray.models.masking import unasked, with_mask
from areal_ray.models.weight_source import WeightSource


class ShardedModel:
    """A causal language model, sharded with FSDP2; a frozen reference is one, and an engine has one that it trains.

    Args:
        config: model, adapter, engine, run.seed and optim.groups (what is frozen) are read.
        dims: of the mesh that it is laid over.
        device: of this rank.
        ranks: all ranks.

    Attributes:
        module: the sharded torch module.
        adapted: which of its weights are the adapter's; None: it has none.
        base: place and fingerprints of the weights that are not, once they are there; None without an adapter.
        units: its modules that are gathered one at a time. Found before sharding, which changes their classes.
        late: gradient reductions that are to be waited for after a backward pass.
        vocabulary: columns of its logits; 0 if it does not say.
        needs_logits: why they cannot be computed by somebody else; None if they can, see `hidden`.
    """

    def __init__(self, config: Config, dims: ParallelDims, device: torch.device, ranks: Ranks) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self.base: dict[str, Any] | None = None
        self.module, self.adapted = models.build_adapted(config.model, config.adapter, config.engine.precision or "")
        freeze(self.module, config.optim.groups)
        self.units = models.shard_units(self.module, config.model.shard_units)
        # Of a model that returns hidden states these are a view; nothing here changes them in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        self.needs_logits: str | None = None
        try:
            self._output_layer = models.output_layer(self.module, self.units, dims.tensor is not None)
            self.vocabulary = self._output_layer.layer.out_features
        except models.NoOutputLayer as error:
            self.needs_logits, self.vocabulary = str(error), 0
        parallelize(self.module, self.units, dims, config.engine)
        self.late = overlap(self.module, dims)
        models.materialise(self.module, device, config.engine.offload == "all")

    def init_weights(self) -> None:
        """Give it the weights with which a run begins: those of model.path, or random ones drawn from run.seed.

        Raises:
            RankError: on every rank, if weights cannot be read from model.path.
            ValueError: on every rank, if they are those of another model.
        """
        path, seed = self._config.model.path, self._config.run.seed
        if path:
            source = first_weights.source_of(self._config.model)
            if self.adapted is not None:
                models.init_adapter(self.module, seed, self.adapted)
                self._load_base(path, source, self.adapted)
            else:
                if source.allow_missing:  # what it lacks stays as drawn
                    models.init_weights(self.module, seed)
                else:
                    models.init_buffers(self.module)
                hf_weights.load_weights(source, self.module, models.build_model(self._config.model), self._ranks)
        else:
            models.init_weights(self.module, seed, self.adapted)
            if self.adapted is not None:
                self._take_fingerprint(self.adapted)
        if self._device.type == "cuda":  # what was needed on the way, from the allocator back to the GPU
            torch.cuda.empty_cache()

    def init_buffers(self) -> None:
        """Set what is in no checkpoint, for when weights are loaded next; parameters stay undefined.

        Beneath an adapter that is the base, too: raises as `init_weights`.
        """
        if self.adapted is not None:
            self.init_weights()
        else:
            models.init_buffers(self.module)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output for these keyword arguments of the module's forward: the logits (B, S, vocabulary)."""
        with unasked(inputs):
            output = self.module(**with_mask(self.module, inputs))
        return output if isinstance(output, torch.Tensor) else output.logits

    def hidden(self, inputs: Mapping[str, torch.Tensor]) -> Hidden:
        """As a call, without the output layer. Its weight is gathered, until the backward pass or `reshard`."""
        with self._output_layer.left_out() as seen:
            # Before FSDP's own hook: the backward pass of the whole begins where its output is asked for a gradient.
            hook = self.module.register_forward_hook(lambda *_: seen[0], prepend=True)
            try:
                states = self(inputs)
            finally:
                hook.remove()
        _, weight, bias = seen
        assert weight is not None
        return Hidden(states, weight, bias, self._output_layer.finish)

    @torch.no_grad()
    def frozen(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As a call, without gradients, dropout and anything left gathered: for a model that is not trained."""
        self.module.eval()
        output = self(inputs)
        self.reshard()
        return output

    def base_alone(self) -> AbstractContextManager[None]:
        """A context in which it computes what its base does, as if there were no adapter."""
        assert self.adapted is not None
        return self.adapted.adapter.disabled(self.module)

    def reshard(self) -> None:
        """Without a backward pass FSDP may leave parameters gathered, and a save would find these in their place."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _load_base(self, path: str, source: WeightSource, adapted: models.Adapted) -> None:
        """Read the base, take its fingerprint on the way, and then what begins as a copy of some of it."""
        found = Fingerprint()
        weights = hf_weights.weights_of(self.module)

        def load(names: Mapping[str, str], seen: hf_weights.Seen) -> None:
            blank = models.build_model(self._config.model)
            into = [(there, weights[name]) for name, there in names.items()]
            hf_weights.load_weights(source, self.module, blank, self._ranks, into, seen)

        def seen(name: str, tensor: torch.Tensor, box: Box, values: torch.Tensor) -> None:
            if _counts(tensor):
                found.add(name, tensor.shape, box, values.to(self._device))

        load(adapted.base, seen)
        if adapted.copies:
            load(adapted.copies, lambda *_: None)

        stored = source.fit(models.build_model(self._config.model), self._ranks).weights
        quick = self._ranks.on_rank_zero(lambda: quick_fingerprint(stored))
        whole = Fingerprint.text(self._ranks.all_reduce_sum(found.total))
        self.base = {"path": path, "fingerprint": whole, "quick": quick}
        if self._config.model.merge_adapter is not None:  # it is not what lies at that path alone
            self.base["merge_adapter"] = self._config.model.merge_adapter

    def _take_fingerprint(self, adapted: models.Adapted) -> None:
        """Take that of a base that was drawn."""
        weights, found = hf_weights.weights_of(self.module), Fingerprint()
        for name, there in adapted.base.items():
            tensor = weights[name]
            if _counts(tensor):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                ends = zip(hf_weights.offsets(tensor), local.shape, strict=True)
                found.add(there, tensor.shape, tuple((at, at + size) for at, size in ends), local)
        whole = Fingerprint.text(self._ranks.all_reduce_sum(found.total))
        self.base = {"drawn_from_seed": self._config.run.seed, "fingerprint": whole}


def _counts(tensor: torch.Tensor) -> bool:
    """Whether this rank's part of a tensor is to be counted: of the same part on several ranks that of one is."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    return all(at == 0 for placement, at in zip(tensor.placements, place, strict=True) if placement.is_replicate())

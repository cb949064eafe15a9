"""Communication beside computation on a device without streams, where FSDP's own waits for each collective at once.

There the ranks meet several times a layer, and whatever holds up one of them for a moment holds up all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from areal_ray.distributed.mesh import ParallelDims

# torch 2.13 has given it another name, and warns of the old one.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class LateReduceScatter:
    """A reduce-scatter that is only started (for `FSDPModule.set_custom_reduce_scatter`); `wait` finishes all of them.

    FSDP must do nothing with the output during the backward pass but make views of it. It would also cast it to
    another dtype, add it to gradients of an earlier backward pass, or sum it over replicas.

    Attributes:
        at_once: whether each is finished before FSDP goes on, because it adds the output to such gradients.
    """

    def __init__(self) -> None:
        self.at_once = False
        self._started: list[Any] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self._started.append(self._start(output_tensor, input_tensor, op=op, group=group))
        if self.at_once:
            self.wait()

    def wait(self) -> None:
        """To be called after the backward pass, before anything reads a gradient."""
        for work in self._started:
            work.wait()
        self._started.clear()

    def _start(self, output: torch.Tensor, input: torch.Tensor, **how: Any) -> Any:
        return reduce_scatter(output, input, async_op=True, **how)


def overlap(model: nn.Module, dims: ParallelDims) -> LateReduceScatter:
    """Gather the next unit beside the backward pass of this one, and reduce its gradients beside that of the next.

    Where FSDP has streams for that, or would do more than make views of the gradients, all is left as it is.

    Args:
        model: sharded over this mesh.
        dims: of the mesh.

    Returns:
        What is to be waited for after every backward pass; at once, if nothing was changed.
    """
    late = LateReduceScatter()
    whole = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if dims.mesh.device_type == "cpu" and dims.only_shards and whole:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(late)  # type: ignore[arg-type]
                module._set_unshard_async_op(True)
    return late

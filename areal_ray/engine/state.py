"""An engine's state as one `Stateful`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.tree import flatten, local
from areal_ray.models.hf_weights import weights_of


class DCPState(Stateful):
    """Model, optimizer and schedule as one `Stateful`, for DCP.

    The tensors in its state are the live ones (DTensors, each rank holding its part), keyed by parameter name:
    `model.<name>` and `optim.<name>.exp_avg` and so on. Loading fills them in place, without a second copy. Nothing
    names a rank, and nothing is pickled: optimizer hyperparameters come from the config, not from the checkpoint.

    After AReaL's DCPState (PR "Support PyTorch DCP for FSDP") and torch's Stateful protocol.

    Args:
        model: sharded or not; tied parameters are saved once.
        optimizer: with its state already made; None leaves it out.
        schedule: anything with state_dict and load_state_dict of plain values; None leaves it out.
        weights: False leaves the model's weights out, for when they are saved in another format.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Stateful | None = None,
        weights: bool = True,
    ) -> None:
        self.model = model
        self._optimizer, self._schedule, self._weights = optimizer, schedule, weights

    def weights(self) -> DCPState:
        """The model alone."""
        return DCPState(self.model)

    def without_weights(self) -> DCPState:
        """Everything but the model's weights."""
        return DCPState(self.model, self._optimizer, self._schedule, weights=False)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._weights:
            state["model"] = weights_of(self.model)
        if self._optimizer is not None:
            state["optim"] = {name: dict(values) for name, values in self._optimizer_state().items()}
        if self._schedule is not None:
            state["schedule"] = self._schedule.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same shape; tensors that were filled in place already are left alone."""
        loaded, _ = flatten(state)
        for name, tensor in flatten(self.state_dict())[0].items():
            if local(loaded[name]).data_ptr() != local(tensor).data_ptr():
                tensor.copy_(loaded[name])
        for name, own in self._optimizer_state().items():
            own.update({key: state["optim"][name][key] for key, v in own.items() if not isinstance(v, torch.Tensor)})
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's own state, by the name of the parameter."""
        if self._optimizer is None:
            return {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: values for parameter, values in self._optimizer.state.items()}  # type: ignore[index]

"""State of an engine as one `Stateful`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.tree import flatten, local
from areal_ray.engine.optim import WeightAverages
from areal_ray.models import Adapted
from areal_ray.models.hf_weights import weights_of

_OF_THE_CONFIG = ("params", "lr", "initial_lr", "weight_decay")  # entries of a parameter group that no step changes


class DCPState(Stateful):
    """Model, optimizer and schedule as one `Stateful`, for DCP.

    The tensors in its state are the live ones (DTensors, each rank holding its part), keyed by parameter name:
    `model.<name>` and `optim.<name>.exp_avg` and so on. Loading fills them in place, without a second copy. Nothing
    names a rank, and nothing is pickled: optimizer hyperparameters come from the config, not from the checkpoint, but
    for numbers that the optimizer itself keeps in its parameter groups and changes.

    After AReaL's DCPState (PR "Support PyTorch DCP for FSDP") and torch's Stateful protocol.

    Args:
        model: sharded or not; tied parameters are saved once.
        optimizer: with the state that it has by now; None leaves it out.
        schedule: anything with state_dict and load_state_dict of plain values; None leaves it out.
        weights: False leaves the model's weights out, for when they are saved in another format.
        group_values: for an optimizer of the user's own, `plain_group_values` when it was made. None: it has all of its
            state from the beginning, and changes nothing in its groups.
        adapted: if the model has an adapter; its base is left out.
        averages: of the weights, saved as `ema.<name>`; None: there are none. Where a checkpoint has none, they begin
            with its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Stateful | None = None,
        weights: bool = True,
        group_values: list[dict[str, Any]] | None = None,
        adapted: Adapted | None = None,
        averages: WeightAverages | None = None,
    ) -> None:
        self.model, self.adapted = model, adapted
        self._optimizer, self._schedule, self._weights = optimizer, schedule, weights
        self._group_values = group_values
        self._averages, self._has_averages = averages, True

    def weights(self) -> DCPState:
        """The model alone."""
        return DCPState(self.model, adapted=self.adapted)

    def without_weights(self) -> DCPState:
        """Everything but the model's weights."""
        own = self._group_values, self.adapted, self._averages
        return DCPState(self.model, self._optimizer, self._schedule, False, *own)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._weights:
            weights = weights_of(self.model)
            state["model"] = weights if self.adapted is None else self.adapted.trained(weights)
        if self._optimizer is not None:
            state["optim"] = {name: dict(values) for name, values in self._optimizer_state().items()}
            if changed := dict(self._changed_group_values()):
                state["optim_groups"] = changed
        if self._averages is not None and self._has_averages:
            state["ema"] = dict(self._averages.tensors)
        if self._schedule is not None:
            state["schedule"] = self._schedule.state_dict()
        return state

    def expect(self, names: Collection[str]) -> None:
        """Leave out what a checkpoint does not have; called before it is loaded.

        That may be averages of the weights, and optimizer state of some parameters: an optimizer of one's own
        makes it with a parameter's first gradient, and some may never have had one.

        Args:
            names: of the tensors in the checkpoint that belong here, as in `state_dict`, by dotted path.
        """
        self._has_averages = any(name.startswith("ema.") for name in names)
        if self._optimizer is None or self._group_values is None or not any(n.startswith("optim.") for n in names):
            return
        for name, parameter in self.model.named_parameters():
            own = self._optimizer.state.get(parameter, {})
            tensors = [key for key, value in own.items() if isinstance(value, torch.Tensor)]
            if tensors and not any(f"optim.{name}.{key}" in names for key in tensors):
                del self._optimizer.state[parameter]

    def reset_averages(self) -> None:
        """Begin averages of the weights, if there are to be any, with those of now."""
        self._has_averages = True
        if self._averages is not None:
            self._averages.reset()

    def aliases(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Other paths of weights that have several names (tied ones), each with the one in `state_dict`.

        torch's `get_model_state_dict` has them all, and with them `.metadata`, so that it can be loaded into.
        """
        if not self._weights:
            return {}
        stored = weights_of(self.model).keys()
        first = {id(weight): name for name, weight in _all_weights(self.model) if name in stored}
        return {
            ("model", name): ("model", first[id(weight)])
            for name, weight in _all_weights(self.model)
            if first.get(id(weight), name) != name
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same shape; tensors that were filled in place already are left alone."""
        loaded, _ = flatten(state)
        for name, tensor in flatten(self.state_dict())[0].items():
            if local(loaded[name]).data_ptr() != local(tensor).data_ptr():
                tensor.copy_(loaded[name])
        for name, own in self._optimizer_state().items():
            own.update({key: state["optim"][name][key] for key, v in own.items() if not isinstance(v, torch.Tensor)})
        if self._optimizer is not None and self._group_values is not None:
            for i, (group, first) in enumerate(zip(self._optimizer.param_groups, self._group_values, strict=True)):
                group.update({**first, **state.get("optim_groups", {}).get(str(i), {})})
        if not self._has_averages:
            self.reset_averages()
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's own state, by the name of the parameter."""
        if self._optimizer is None:
            return {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: values for parameter, values in self._optimizer.state.items()}  # type: ignore[index]

    def _changed_group_values(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._optimizer is None or self._group_values is None:
            return
        now = plain_group_values(self._optimizer)
        for i, (values, first) in enumerate(zip(now, self._group_values, strict=True)):
            if changed := {name: value for name, value in values.items() if value != first.get(name)}:
                yield str(i), changed


def _all_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def plain_group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Numbers and words in each parameter group but those of the configuration: what a step may change."""

    def plain(group: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in _OF_THE_CONFIG and type(v) in (int, float, bool, str)}

    return [plain(group) for group in optimizer.param_groups]

"""The export of a checkpoint that has an adapter: as a directory of peft, or merged into its base."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from areal_ray import models
from areal_ray.config import AdapterConfig, ConfigError
from areal_ray.models import adapters, hf_weights, safetensors_files
from areal_ray.models.adapters.files import check_alone, write_adapter
from areal_ray.models.lazy_tensor import part_of, whole_box, windows
from areal_ray.models.merged_adapter import MergedAdapter
from areal_ray.models.weight_source import fit, of_directory
from areal_ray.storage import Storage

_WINDOW = 64 << 20  # bytes of the base that are read at a time for its fingerprint


class SavedAdapter:
    """The adapter of a checkpoint, put into its model on the meta device.

    Args:
        info: of the manifest.
        adapter: one of a user's own; None: what the manifest names, which is not called if it is somebody's own.

    Raises:
        ValueError: if it cannot be made, or is not for that model.
    """

    def __init__(self, info: Mapping[str, Any], adapter: models.Adapter | None = None) -> None:
        self._said, self._architecture = info["adapter"], info["hf_config"]
        name, args = _name_and_args(self._said)
        if adapter is None and name != "lora":
            text = "and what a checkpoint names is not called unasked: give it to areal_ray.tools.export.export"
            raise ValueError(f"the run's adapter was {name!r}, {text}")
        self._model = models.build_saved(self._architecture)
        try:
            self._adapted = adapters.attach(adapter or models.build_adapter(AdapterConfig(name, args)), self._model)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def write(self, out: Storage, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write the adapter alone, see `write_adapter`.

        Raises:
            ValueError: if its base is more than what lies at one path.
        """
        path = self._said["base"].get("path")
        check_alone(path, self._said["base"].get("merge_adapter"))
        return write_adapter(out, self._model, self._adapted, trained, path)

    def merged(
        self, trained: Mapping[str, torch.Tensor], base: str | None = None, base_adapter: str | None = None
    ) -> dict[str, torch.Tensor]:
        """The weights of the base with the adapter in them, by the names of the base: lazy, in float32.

        The base is read twice, once for its fingerprint.

        Args:
            trained: what the checkpoint has, by name.
            base: directory or hub name of the base. What the checkpoint names is not read unasked; None is for a base
                that was drawn.
            base_adapter: directory of the adapter of peft that was added to it, if one was (model.merge_adapter).

        Raises:
            ValueError: if it is not given, not there, or not the one that the adapter was trained on.
        """
        weights = self._base(base, base_adapter)
        self._check(weights, base)

        def merge(here: str, there: str) -> torch.Tensor:
            if here not in self._adapted.frozen:  # a buffer, which training may change
                return trained[here]
            weight = weights[there]
            weight = weight.float() if weight.is_floating_point() else weight
            return self._adapted.adapter.merged(self._model, here, weight, trained)

        return {there: merge(here, there) for here, there in self._adapted.base.items()}

    def _base(self, given: str | None, added: str | None) -> dict[str, torch.Tensor]:
        seed, path, before = (self._said["base"].get(key) for key in ("drawn_from_seed", "path", "merge_adapter"))
        if given is None and added is None and isinstance(seed, int):
            return _drawn(models.build_saved(self._architecture), seed)
        if given is None or (added is None and before is not None):
            was, options = repr(path), f"--base {shlex.quote(str(path))}"
            if before is not None:
                was, options = f"{was} with {before!r} added", f"{options} --base-adapter {shlex.quote(str(before))}"
            raise ValueError(
                f"the adapter's base was {was}, and what a checkpoint names is not read unasked: give {options}"
            )
        here = hf_weights.resolve(given)
        blank = models.build_saved(self._architecture)
        source = replace(of_directory(here), adapter=None if added is None else MergedAdapter.read(added))
        return fit(source, blank, safetensors_files.opened(here)).weights

    def _check(self, weights: Mapping[str, torch.Tensor], given: str | None) -> None:
        found = adapters.Fingerprint()
        for name in self._adapted.base.values():
            tensor = weights[name]
            for box in windows(whole_box(tensor.shape), tensor.dtype.itemsize, _WINDOW):
                found.add(name, tensor.shape, box, part_of(tensor, box))
        now, was = found.text(found.total), self._said["base"].get("fingerprint")
        if now != was:
            where = given or "the base, drawn anew,"
            text = f"is not the base that the adapter was trained on: its fingerprint is {now}, and was {was}"
            raise ValueError(f"{where} {text}")


def _name_and_args(said: Any) -> tuple[str, dict[str, Any]]:
    """Of the adapter in a manifest, which anybody may have written."""
    types = {"name": str, "args": dict, "base": dict}
    if not isinstance(said, dict) or not all(isinstance(said.get(key), kind) for key, kind in types.items()):
        raise ValueError("the checkpoint does not say which adapter it is of: it cannot be exported")
    return said["name"], said["args"]


def _drawn(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    models.materialise(model, torch.device("cpu"))
    models.init_weights(model, seed)
    return hf_weights.weights_of(model)

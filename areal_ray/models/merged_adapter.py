"""An adapter of peft (LoRA), added to weights while they are read: W + scale B A, of which a rank computes its part.

The format: adapter_config.json and adapter_model.safetensors as peft's `save_pretrained` writes them, see
peft/utils/save_and_load.py and, for what is added, `get_delta_weight` in peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from areal_ray.models.lazy_tensor import Box, LazyTensor, part_of
from areal_ray.models.safetensors_files import opened

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.weight)?")
_REFUSED = {  # settings under which a layer computes something else than W + scale B A
    "use_dora": "DoRA",
    "alora_invocation_tokens": "an activated LoRA, which changes some tokens only",
    "trainable_token_indices": "single rows that were trained",
    "target_parameters": "parameters that are no layers",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing",
    "layer_replication": "copies of layers",
    "use_bdlora": "a block-diagonal LoRA",
    "kasa_config": "KaSA",
}
_PIECE = 1 << 16  # elements of a product at a time
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # first values that take something from the base


@dataclass(frozen=True)
class _Pair:
    """The two factors that are added to one weight.

    Args:
        a, b: (r, in) and (out, r).
        scale: of their product.
        transposed: whether the weight is (in, out), as in an embedding or a Conv1D.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    def read(self, base: torch.Tensor, box: Box) -> torch.Tensor:
        """The values in a box of the weight with the product added, in float32."""
        rows, columns = (box[1], box[0]) if self.transposed else box
        a = part_of(self.a, ((0, self.a.shape[0]), columns)).float()
        b = part_of(self.b, (rows, (0, self.b.shape[1]))).float()
        added = _product(b, a) * self.scale
        return part_of(base, box).float() + (added.T if self.transposed else added)


def _product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`b @ a`, in which an element has the same bits whatever rows and columns are beside it.

    A library's product is another sum for a few rows than for many, so that a rank's part would depend on how many
    ranks there are, and the fingerprint of the base with it. Here each element is summed in the order of the rank.
    Time: a pass over the product for each of the rank, in pieces that stay in the cache.
    """
    found = torch.zeros(b.shape[0], a.shape[1])
    rows = max(1, _PIECE // max(1, a.shape[1]))
    for begin in range(0, len(found), rows):
        into, factors = found[begin : begin + rows], b[begin : begin + rows]
        term = torch.empty_like(into)
        for k in range(len(a)):  # two roundings for each, not one or two as a fused addition chooses
            into += torch.mul(factors[:, k : k + 1], a[k], out=term)
    return found


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter of peft to be added to the weights of its base.

    Args:
        path: of its directory.
        config: adapter_config.json.

    Raises:
        ValueError: if it is no LoRA, or one that changes more than the weights of layers.
    """

    path: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if (kind := self.config.get("peft_type")) != "LORA":
            raise ValueError(f"the adapter in {self.path} is {kind!r}; only LORA can be added to weights")
        for key, meant in _REFUSED.items():
            if self.config.get(key):
                raise ValueError(f"the adapter in {self.path} has {key}: {meant} cannot be added to the weights here")
        if str(first := self.config.get("init_lora_weights")).startswith(_CHANGES_BASE):
            text = f"the adapter in {self.path} was begun as {first}, which has changed its base: save it converted"
            raise ValueError(f"{text} (peft's save_pretrained with path_initial_model_for_weight_conversion)")

    @classmethod
    def read(cls, path: str) -> MergedAdapter:
        """The adapter in a directory; its tensors are not read.

        Raises:
            ValueError: if there is none, or as the class.
        """
        try:
            with open(os.path.join(path, CONFIG)) as file:
                config = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"no adapter of peft in {path!r}: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"no adapter of peft in {path!r}: its {CONFIG} is no object")
        return cls(path, config)

    @property
    def base(self) -> str | None:
        """The model that it was trained on: a directory or hub name; None if it does not say."""
        return self.config.get("base_model_name_or_path") or None

    def added_to(
        self, weights: Mapping[str, torch.Tensor], tied: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Weights with the adapter added, not read yet; and what of the adapter does not fit them, a clause each.

        Args:
            weights: of the base, by name.
            tied: names of weights that have several; an adapter changes what is computed under one of them only.
        """
        found, problems = dict(weights), list[str]()
        factors: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        for key, tensor in opened(self.path).items():
            name = key.removeprefix(_PREFIX)
            if match := _PAIR.fullmatch(name):
                factors.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
                continue
            # Trained whole (modules_to_save, biases), or the base's as the adapter knew it (an embedding's).
            name = name.replace(".base_layer.", ".")
            if name in tied:
                problems.append(
                    f"{name} of the adapter is one of several names of a weight (model.tie=false parts them)"
                )
            elif name in found and found[name].shape == tensor.shape:
                found[name] = tensor
            else:
                problems.append(f"{key} of the adapter is no weight of it")
        for (layer, embedding), parts in factors.items():
            name, pair = f"{layer}.weight", self._pair(layer, embedding, parts)
            base = found.get(name)
            if name in tied:
                problems.append(
                    f"{name} of the adapter is one of several names of a weight (model.tie=false parts them)"
                )
            elif pair is None or base is None or base.ndim != 2 or not _fits(pair, base):
                problems.append(f"{layer} of the adapter is no layer of it")
            else:
                found[name] = LazyTensor(base.shape, torch.float32, partial(pair.read, base))
        return found, problems

    def _pair(self, layer: str, embedding: bool, parts: Mapping[str, torch.Tensor]) -> _Pair | None:
        if parts.keys() != {"A", "B"} or any(part.ndim != 2 for part in parts.values()):
            return None
        rank = int(_of_layer(self.config.get("rank_pattern"), layer, self.config["r"]))
        alpha = float(_of_layer(self.config.get("alpha_pattern"), layer, self.config["lora_alpha"]))
        scale = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
        return _Pair(parts["A"], parts["B"], scale, embedding or bool(self.config.get("fan_in_fan_out")))


def _of_layer(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that is all of a layer's name, or its end after a dot, as in peft."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _fits(pair: _Pair, base: torch.Tensor) -> bool:
    shape = (pair.b.shape[0], pair.a.shape[1])
    return pair.a.shape[0] == pair.b.shape[1] and tuple(base.shape) == (shape[::-1] if pair.transposed else shape)

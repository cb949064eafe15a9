"""LoRA by peft: low-rank products beside frozen linear layers (Hu et al., https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from areal_ray.config import ConfigError
from areal_ray.models.adapters.adapter import Adapter
from areal_ray.models.lazy_tensor import Box, LazyTensor, part_of

# Of LoraConfig: what leaves the base as it is, and begins without looking at its values.
_KNOWN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "fan_in_fan_out",
)
_NAME = "default"  # peft's own name for the one adapter of a model


class Lora(Adapter):
    """LoRA layers around those linear ones (and embeddings) that `target_modules` names.

    Args:
        args: of peft.LoraConfig, some of them; as there, `target_modules` may be left out for models that peft knows.

    Raises:
        ConfigError: for others, or values that peft refuses.
    """

    def __init__(self, args: Mapping[str, Any]) -> None:
        if other := sorted(set(args) - set(_KNOWN)):
            text = f"of peft's LoraConfig lora takes {', '.join(_KNOWN)}; not {', '.join(other)}"
            raise ConfigError("adapter.args", text)
        first = args.get("init_lora_weights", True)
        if first is not True and first != "gaussian":
            text = f"must be true or gaussian, with which the first outputs are those of the base; not {first!r}"
            raise ConfigError("adapter.args.init_lora_weights", text)
        self._first = first
        try:
            self._config = LoraConfig(task_type="CAUSAL_LM", **args)
        except (TypeError, ValueError) as error:
            raise ConfigError("adapter.args", " ".join(str(error).split())) from None

    def attach(self, model: nn.Module) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # for Conv1D, by peft itself
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # refused, by `attach`
                inject_adapter_in_model(self._config, model, _NAME)
        except (TypeError, ValueError, NotImplementedError) as error:
            text = f"not for {type(model).__name__}: {' '.join(str(error).split())[:300]}"
            raise ConfigError("adapter.args", text) from None
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and not hasattr(module, "get_delta_weight"):
                kind = type(module.get_base_layer()).__name__
                raise ConfigError("adapter.args.target_modules", f"{name} is a {kind}, which LoRA is not merged into")

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        # Not peft's own method, which switches gradients of parameters, too.
        layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def rule(self, module: nn.Module) -> Callable[[], None] | None:
        if isinstance(module, LoraLayer):
            return lambda: module.reset_lora_parameters(_NAME, self._first)
        return None

    def copies(self, model: nn.Module) -> Mapping[str, str]:
        wrappers = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
        return {f"{name}.modules_to_save.{_NAME}": f"{name}.original_module" for name in wrappers}

    def merged(
        self, model: nn.Module, name: str, weight: torch.Tensor, trained: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """As `Adapter.merged`; while a weight is read, the whole of what is added to it is in memory."""
        layer_name, _, rest = name.rpartition(".base_layer.")
        layer = model.get_submodule(layer_name) if layer_name else None
        if isinstance(layer, LoraLayer) and rest == "weight":
            mine = {key.removeprefix(f"{layer_name}."): t for key, t in trained.items() if key.startswith(layer_name)}
            return _with_product(layer, weight, mine)
        wrapper, _, rest = name.partition(".original_module.")
        return trained.get(f"{wrapper}.modules_to_save.{_NAME}.{rest}", weight) if rest else weight

    def directory(
        self, model: nn.Module, trained: Mapping[str, torch.Tensor], base: str | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As PeftModel.save_pretrained writes it, so that PeftModel.from_pretrained reads it."""
        kept = get_peft_model_state_dict(model, dict(trained), _NAME, save_embedding_layers=False)
        config: Any = model.peft_config[_NAME]  # type: ignore[index]  # with what peft has filled in
        values = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
        plain = json.loads(
            json.dumps(values, default=lambda each: sorted(each) if isinstance(each, set) else str(each))
        )
        return {f"base_model.model.{name}": tensor for name, tensor in kept.items()}, plain


def _with_product(layer: Any, weight: torch.Tensor, trained: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A lazy tensor of a base layer's weight and the low-rank product, in float32."""
    made: list[torch.Tensor] = []

    def read(box: Box) -> torch.Tensor:
        if not made:
            for key, tensor in trained.items():
                place, _, last = key.rpartition(".")
                whole = part_of(tensor, tuple((0, size) for size in tensor.shape)).float()
                layer.get_submodule(place).register_parameter(last, nn.Parameter(whole, requires_grad=False))
            made.append(layer.get_delta_weight(_NAME))
        found = part_of(weight, box).float() + part_of(made[0], box)
        if all(end == size for (_, end), size in zip(box, weight.shape, strict=True)):  # its last part
            made.clear()
        return found

    return LazyTensor(weight.shape, torch.float32, read)

"""Weights between the names and shapes of a Hugging Face directory and those of modules, by transformers' own rules.

transformers 5 renames weights on their way, and fuses the experts of a layer into one tensor. Its rules are done to
tensors that are not read yet, so that a rank reads only what its part of a fused one consists of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Converted:
    """Stored weights as a model takes them.

    Args:
        weights: by the names of the model's parameters and persistent buffers, tied ones under any of their names.
        problems: what does not fit, a clause each.
        unknown: names of what the model does not take.
    """

    weights: dict[str, torch.Tensor]
    problems: list[str]
    unknown: list[str]


def to_module(blank: nn.Module, stored: Mapping[str, torch.Tensor]) -> Converted:
    """Stored weights under the names, and in the shapes, that they have in a model.

    Args:
        blank: the model on the meta device, unsharded; the weights are put into it.
        stored: by the names of the files; lazy ones are not read.
    """
    if not _of_transformers(blank):
        names = names_of_module(blank)
        return Converted({name: stored[name] for name in names if name in stored}, [], sorted(set(stored) - names))
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    how = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(blank))
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(blank, dict(stored), how)
    missing = set(info.missing_keys)
    weights = {name: tensor for name, tensor in blank.state_dict().items() if name not in missing}
    problems = [f"{name} is {tuple(was)} in it and {tuple(here)} here" for name, was, here in info.mismatched_keys]
    for name, text in info.conversion_errors.items():
        problems.append(f"{name} cannot be put together: {str(text).strip().splitlines()[-1]}")
    blank._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]  # those that the model says to ignore
    known = _buffers_of_older_files(blank)
    return Converted(weights, sorted(problems), sorted(set(info.unexpected_keys) - known))


def names_of_module(model: nn.Module) -> set[str]:
    """Names of parameters and persistent buffers, tied ones under all of their names."""
    return set(model.state_dict().keys())


def to_files(blank: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights under the names, and in the shapes, that transformers saves them in.

    Args:
        blank: the model on the meta device, unsharded.
        weights: by the names of its parameters and buffers; lazy ones are not read.
    """
    if not _of_transformers(blank):
        return dict(weights)
    from transformers.core_model_loading import revert_weight_conversion

    left_out = [re.compile(pattern) for pattern in getattr(blank, "_keys_to_ignore_on_save", None) or ()]
    kept = {name: tensor for name, tensor in weights.items() if not any(each.search(name) for each in left_out)}
    return dict(revert_weight_conversion(blank, kept))


def _of_transformers(model: nn.Module) -> bool:
    return hasattr(model, "base_model_prefix") and hasattr(model, "_adjust_missing_and_unexpected_keys")


def _buffers_of_older_files(model: nn.Module) -> set[str]:
    """Names of buffers that the model makes itself, and that older files have all the same."""
    names = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    return names | {name.removeprefix(prefix) for name in names}


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without transformers' progress bars."""
    from transformers.utils import logging

    shown: Any = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

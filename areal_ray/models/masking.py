"""Attention masks of a forward pass: given where a model insists on one, and never asked about on the device."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn


def with_mask(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Inputs of the module's forward, with a mask of ones if they have none and it cannot be called without."""
    if "attention_mask" in inputs or not _insists(type(module)):  # type: ignore[arg-type]
        return inputs
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


@cache
def _insists(kind: type[nn.Module]) -> bool:
    parameter = inspect.signature(kind.forward).parameters.get("attention_mask")
    return parameter is not None and parameter.default is inspect.Parameter.empty


@contextmanager
def one_document_per_row(inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A context in which transformers does not look for documents packed into rows, where inputs have no positions.

    Without a mask it compares the positions, even those that it has counted itself, and the host waits for the answer
    in every forward pass (masking_utils._preprocess_mask_arguments). Should a newer transformers ask elsewhere, it
    waits there again, and nothing else is different.
    """
    masks = sys.modules.get("transformers.masking_utils")  # not imported: the model is not one of transformers
    if masks is None or "position_ids" in inputs or not hasattr(masks, "find_packed_sequence_indices"):
        yield
        return
    asking = masks.find_packed_sequence_indices
    masks.find_packed_sequence_indices = _not_packed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = asking  # type: ignore[attr-defined]


def _not_packed(position_ids: torch.Tensor) -> None:
    """The answer for rows of one document each."""

"""Attention masks of a forward pass: given where a model insists on one, and never asked about on the device."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

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


_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def keeps_no_documents_apart(module: nn.Module) -> str | None:
    """Why a model does not keep documents of a row apart whose position_ids begin anew with each; None: it does.

    Those of transformers do that make their masks by its masking_utils, unless a layer is no attention and carries
    something on from token to token. Of others all that is known is whether they are given positions.
    """
    kind = type(module)
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__} takes no position_ids, by which documents are told apart"
    if not kind.__module__.startswith("transformers."):
        return None
    if not hasattr(sys.modules[kind.__module__], "create_causal_mask"):
        return f"{kind.__name__} makes masks of its own, which know no documents"
    layers = set(getattr(module.config, "layer_types", None) or ())
    if others := sorted(layers - _ATTENTION):
        return f"{kind.__name__} has layers of {', '.join(others)}, which carry on from one document to the next"
    return None


@contextmanager
def unasked(inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A context in which transformers asks the device nothing about masks and positions: the host would wait for it.

    In every forward pass it looks whether a mask masks anything, and without a mask whether the positions, even those
    that it has counted itself, are of several documents (masking_utils._ignore_causal_mask_sdpa and
    find_packed_sequence_indices). Rows without positions are of one document each. On a GPU rows with positions are of
    several, and a mask masks something: if that is not so, the attention is the same, by a slower kernel.

    Should a newer transformers ask elsewhere, it waits there again, and nothing else is different.
    """
    masks = sys.modules.get("transformers.masking_utils")  # not imported: the model is not one of transformers
    answers = {name: answer for name, answer in _answers(inputs).items() if hasattr(masks, name)}
    asking = {name: getattr(masks, name) for name in answers}
    for name, answer in answers.items():
        setattr(masks, name, answer)
    try:
        yield
    finally:
        for name, question in asking.items():
            setattr(masks, name, question)


def _answers(inputs: Mapping[str, torch.Tensor]) -> dict[str, Callable[..., Any]]:
    """By the name of transformers' function that asks. On a CPU nothing waits, and each row gets its fastest kernel."""
    answers: dict[str, Callable[..., Any]] = {}
    on_gpu = any(tensor.is_cuda for tensor in inputs.values())
    if "position_ids" not in inputs:
        answers["find_packed_sequence_indices"] = _one_document
    elif on_gpu:
        answers["find_packed_sequence_indices"] = _documents
    if "attention_mask" in inputs and on_gpu:
        answers["_ignore_causal_mask_sdpa"] = _never
    return answers


def _one_document(position_ids: torch.Tensor) -> None:
    """Rows of one document each."""


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    """The number of each token's document in its row; a document begins where positions do not count on."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _never(*_: Any, **__: Any) -> bool:
    """No mask may be left out."""
    return False

"""Operations of a model, counted on a model without memory: what its hardware utilisation is a share of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from areal_ray.models.masking import unasked, with_mask

_TOKENS = 32  # of the short row; the other one is twice as long


def operations_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations of a forward and backward pass, for each position of a row.

    Counted of matrix products and attention in a pass on the meta device (torch.utils.flop_counter), so that of experts
    those count that a token is sent to, and frozen weights get no gradient; attention counts in full, as in PaLM
    (Chowdhery et al., 2022, appendix B), and nothing that activation checkpointing computes again. A model that knows
    better has a method `operations_per_token(seq_len)`. Costs a second or less for models of 80 layers, whatever their
    width: two short rows are counted, and what grows with the square of the length is extended to a whole one.

    Args:
        model: on the meta device, in a copy of one's own: its number format is changed.
        seq_len: positions of a row.

    Raises:
        ValueError: if the model cannot be run so.
    """
    own = getattr(model, "operations_per_token", None)
    if callable(own):
        return float(own(seq_len))
    model = model.to(torch.bfloat16)  # products of experts know no other on this device
    if seq_len <= 2 * _TOKENS:
        return _count(model, seq_len) / seq_len
    short, long = (_count(model, length) / length for length in (_TOKENS, 2 * _TOKENS))
    # A token's share of attention grows with the row; what a recurrent model begins each row with does the contrary.
    return long + max(0.0, long - short) / _TOKENS * (seq_len - 2 * _TOKENS)


def _count(model: nn.Module, length: int) -> float:
    """Operations for one row."""
    inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long, device="meta")}
    try:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            with unasked(inputs):
                output = model(**with_mask(model, inputs))
            logits = output if isinstance(output, torch.Tensor) else output.logits
            logits.sum().backward()
    except Exception as error:  # noqa: BLE001  (a model may ask for values, which there are none of, in many ways)
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    finally:
        model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _grouped_product(
    a: Sequence[int], b: Sequence[int], *_: Any, out_shape: Sequence[int] | None = None, **__: Any
) -> int:
    """Operations of a product of groups of rows with a matrix each, or of its gradients: every row is in one group."""
    if len(a) == len(b) == 3:
        return 2 * math.prod(a) * b[2]
    if len(a) == 3:
        return 2 * a[1] * a[2] * b[1]
    return 2 * a[0] * a[1] * b[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    op: _grouped_product
    for name in ("_grouped_mm", "_scaled_grouped_mm")
    if (op := getattr(torch.ops.aten, name, None)) is not None  # private to torch: without it experts do not count
}

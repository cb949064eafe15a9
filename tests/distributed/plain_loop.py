"""A training loop in plain PyTorch, which the engine must agree with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.small import global_batch, small_config

RATES = [1e-3, 2e-3, 2e-3, 1.1e-3]  # two steps of warm-up, then a cosine over two from 2e-3 down to 2e-4
STEPS = 3


def reference(initial: dict[str, torch.Tensor], clip: float | None = 0.5) -> dict[str, Any]:
    """The same training, written down plainly: one process, whole batches, no package code but the config's values."""
    config = small_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.config), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[f"model.{name}"])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    seen: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        loss = _reference_loss(model, global_batch(step))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else float("inf"))
        optimizer.step()
        seen["steps"].append({"loss": loss.item(), "grad_norm": norm.item(), "lr": RATES[step]})
        seen[f"after {step + 1}"] = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
        if step == 0:
            seen["eval"] = _reference_loss(model, global_batch(100)).item()
            seen["logits"] = model(**global_batch(100)).logits.detach()
    return seen


def _reference_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over all predicted tokens of the global batch."""
    log_p = torch.log_softmax(model(**batch).logits[:, :-1], dim=-1)
    nll = -log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    counts = batch["attention_mask"][:, 1:]
    return (nll * counts).sum() / counts.sum()

"""Memory of a rank, estimated from the model's shapes: before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from areal_ray import models
from areal_ray.config import Config
from areal_ray.models.shard_units import shard_units

_FLOAT = 4
# Bytes of activations that autograd keeps for each token and hidden unit of a decoder layer, in units of the number
# format: inputs of the norms and matrix products, the gated MLP and attention without its scores. Korthikanti et al.,
# https://arxiv.org/abs/2205.05198, section 4.1, with the MLP's width apart.
_PER_HIDDEN, _PER_INTERMEDIATE = 10, 3
# Of these the results of its seven matrix products, of attention, and its input: what `selective` keeps.
_PRODUCTS_PER_HIDDEN, _PRODUCTS_PER_INTERMEDIATE = 7, 2
_CHUNK = 128 << 20  # of logits that there are at a time where the loss is computed in parts, as in engine/hidden.py


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by what they are for.

    Args:
        parameters: of the whole model, its adapter included.
        trained: of these, those that have gradients.
        device: on the device (on a CPU: of the process); weights and gradients and optimizer are this rank's shards.
        host: beside it in the host's memory, for one rank.
    """

    parameters: int
    trained: int
    device: dict[str, int]
    host: dict[str, int]


def estimate(config: Config, workers: int, model: nn.Module | None = None, chunked: bool = False) -> MemoryEstimate:
    """Estimate the memory of one rank of so many.

    Weights, gradients, optimizer and copies are exact up to padding; activations are a rule of thumb, within
    about a third for decoder-only transformers, and leave out what the compiler saves.

    Args:
        config: of the run.
        workers: training workers.
        model: on the meta device, if it has been built; parameters that need no gradient are frozen.
        chunked: whether the loss is computed without all logits, see `engine.hidden`.
    """
    if model is None:
        model, _ = models.build_adapted(config.model, config.adapter, config.engine.precision or "")
    mesh, train = config.engine.mesh, config.train
    copies = mesh.replicate
    shards = max(1, workers // copies)  # tensor parallel ranks share the parameters, too
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    width = 2 if config.engine.precision == "bfloat16" else _FLOAT
    units = [sum(p.numel() for p in unit.parameters()) for unit in shard_units(model, config.model.shard_units)]
    outside = count - sum(units)
    largest = sorted([*units, outside], reverse=True)[:2]  # one computes while the next is gathered
    ranks = max(1, workers // mesh.tensor)
    micro_batches = max(1, train.global_batch_size // ranks // train.micro_batch_size)
    whole = micro_batches > 1 and config.engine.accumulate == "unsharded"
    tokens = min(train.micro_batch_size, max(1, train.global_batch_size // ranks)) * train.seq_len
    saved = count if config.adapter is None else trained  # what an adapter leaves as it is is not saved
    logits = 2 * _FLOAT * tokens * _rows(model)
    head = _chunk_bytes(model, width)
    optimizer = _optimizer(config, model, shards)
    averages = _FLOAT * trained // shards if config.optim.ema is not None else 0
    state = _FLOAT * saved // shards + optimizer + averages
    device = {
        "weights": weights // shards,
        "gradients": _FLOAT * (trained if whole else trained // shards),
        "optimizer": optimizer,
        **({"averages": averages} if averages else {}),
        # What is offloaded comes to the device by units, to a single one, too.
        "gathered layers": width * sum(largest) if shards > 1 or config.engine.offload == "all" else 0,
        "activations": _activations(config, model, tokens, width, max(1, len(units))),
        "logits": min(logits, head) if chunked else logits,
    }
    host = {
        **(_offloaded(device, _FLOAT * trained // shards if whole else 0) if config.engine.offload == "all" else {}),
        "checkpoint image": state if config.checkpoint.async_save else 0,
        "copies in memory": 2 * state if config.checkpoint.memory_every_steps else 0,
        "copies of a partner": 2 * state if config.checkpoint.memory_partner else 0,
    }
    return MemoryEstimate(count, trained, device, host)


def _offloaded(device: dict[str, int], reduced: int) -> dict[str, int]:
    """Take what engine.offload=all has in the host's memory off the device.

    Args:
        device: bytes by what they are for; changed.
        reduced: bytes of reduced gradients, where whole ones add up on the device before; 0 where they do not.
    """
    away = {part: device.pop(part) for part in ("weights", "optimizer", "averages") if part in device}
    return away | {"gradients": reduced or device.pop("gradients")}


def _activations(config: Config, model: nn.Module, tokens: int, width: int, layers: int) -> int:
    about = getattr(model, "config", None)
    hidden = getattr(about, "hidden_size", 0) or getattr(about, "n_embd", 0)
    intermediate = getattr(about, "intermediate_size", 0) or 4 * hidden
    one = tokens * width * (_PER_HIDDEN * hidden + _PER_INTERMEDIATE * intermediate)
    how = config.engine.recomputed
    if not how.every:
        return layers * one
    again = -(-layers // how.every)
    kept = tokens * width * hidden
    if how.keeps_products:
        kept = tokens * width * (_PRODUCTS_PER_HIDDEN * hidden + _PRODUCTS_PER_INTERMEDIATE * intermediate)
    # The last unit that is computed again has all of its own then, when those behind it are done with theirs.
    working = one if (again - 1) * how.every == layers - 1 else 0
    return again * kept + (layers - again) * one + working


def _optimizer(config: Config, model: nn.Module, shards: int) -> int:
    """Bytes of the optimizer's state on a rank; one of one's own is taken to be like AdamW."""
    every = [p for p in model.parameters() if p.requires_grad]
    numbers = 2 * sum(p.numel() for p in every)
    match config.optim.name:
        case "sgd":
            numbers = numbers // 2 if config.optim.args.get("momentum", 0.9) else 0
        case "adafactor":  # a row and a column of each matrix, whole on every rank
            numbers = sum(p.numel() for p in every if p.ndim < 2)
            factors = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in every if p.ndim >= 2)
            return _FLOAT * numbers // shards + _FLOAT * factors
        case "muon":
            outer = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
            head = getattr(model, "get_output_embeddings", lambda: None)()
            outer |= {head.weight} if head is not None else set()
            numbers -= sum(p.numel() for p in every if p.ndim == 2 and p not in outer)
    return _FLOAT * numbers // shards


def _rows(model: nn.Module) -> int:
    """Rows of the output layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return int(head.weight.shape[0]) if head is not None else 0


def _chunk_bytes(model: nn.Module, width: int) -> int:
    """Bytes of a loss without all logits: some rows of them, and the output layer's weight with its gradient."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 2 * _CHUNK + (2 * width * head.weight.numel() if head is not None else 0)

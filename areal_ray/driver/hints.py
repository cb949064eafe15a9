"""Hints for the usual failures: what to change, with the numbers of this run."""

from __future__ import annotations

import re
from collections.abc import Callable

from areal_ray.cluster.failures import Cause
from areal_ray.config import Config


def hint(cause: Cause, config: Config) -> str | None:
    """What to do about a failure, for the kinds that people meet again and again; None for all others."""
    text = f"{cause.kind}: {cause.message}"
    return next((tell(config) for pattern, tell in _HINTS if pattern.search(text)), None)


def _device_memory(config: Config) -> str:
    return (
        f"the device has too little memory. In this order: train.micro_batch_size={_less(config)}; "
        f"{_checkpointing(config)}a smaller train.seq_len (now {config.train.seq_len}); more workers, among which "
        "weights, gradients and optimizer are shared"
    )


def _host_memory(config: Config) -> str:
    memory = config.checkpoint.memory_every_steps is not None
    copies = "checkpoint.memory_every_steps=null (copies in memory take twice the state); " if memory else ""
    return (
        f"the machine has too little memory, and something was killed to make room. In this order: {copies}"
        f"cluster.standbys=off; train.micro_batch_size={_less(config)}; fewer workers a node"
    )


def _less(config: Config) -> str:
    size = config.train.micro_batch_size
    return f"{size // 2}" if size > 1 else "1 (it is that already)"


def _checkpointing(config: Config) -> str:
    return "" if config.engine.activation_checkpointing else "engine.activation_checkpointing=true; "


def _index(config: Config) -> str:
    tokenizer = "that of the model" if config.data.tokenizer is None else repr(config.data.tokenizer)
    return (
        f"an index is too large for a table: a token id beyond the rows of the embedding (tokenizer {tokenizer}), or "
        f"a position beyond those that the model has (train.seq_len={config.train.seq_len})"
    )


def _not_finite(config: Config) -> str:
    return (
        f"a number is not finite. A smaller optim.lr (now {config.optim.lr:g}), a longer optim.warmup_steps (now "
        f"{config.optim.warmup_steps}), optim.clip_grad_norm (now {config.optim.clip_grad_norm}); or let such steps be "
        "left out: train.bad_step.on_bad=skip"
    )


def _full(config: Config) -> str:
    return (
        f"{config.run.storage_path} or a temporary folder is full: delete what is not needed, or keep fewer "
        "checkpoints (checkpoint.keep.last=3). The run goes on from its last checkpoint"
    )


def _credentials(config: Config) -> str:
    return (
        f"{config.run.storage_path} refuses the credentials: see run.s3, the AWS variables of every node, and how long "
        "a session's token is good for"
    )


def _late(config: Config) -> str:
    return (
        f"a rank waited {config.cluster.collective_timeout_s:.0f} s for the others. Which one was late, and in what, "
        "stands in the ledger (stuck); where it only needs longer: cluster.collective_timeout_s"
    )


def _shapes(config: Config) -> str:
    return (
        f"tensors do not fit each other. The model is given input_ids of shape ({config.train.micro_batch_size}, "
        f"{config.train.seq_len})"
    )


_HINTS: tuple[tuple[re.Pattern[str], Callable[[Config], str]], ...] = tuple(
    (re.compile(pattern, re.I), tell)
    for pattern, tell in (
        (r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory", _device_memory),
        (r"killed for lack of memory|DefaultCPUAllocator|Cannot allocate memory|^MemoryError", _host_memory),
        (r"^IndexError: index out of range in self|indexSelect|device-side assert|index .* is out of bounds", _index),
        (r"not finite|\bnan\b.*(loss|grad)|(loss|grad).*\bnan\b", _not_finite),
        (r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT", _full),
        (r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|NoCredentials|\b403\b", _credentials),
        (r"Watchdog caught collective|collective.*tim|Timed out waiting \d+ms", _late),
        (r"size mismatch|shapes cannot be multiplied|must match the size of tensor|shape .* is invalid", _shapes),
    )
)

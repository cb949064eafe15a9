"""Hints for the usual failures: what to change, with the numbers of this run."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

from areal_ray import models
from areal_ray.cluster.failures import Cause
from areal_ray.config import Config
from areal_ray.driver.memory import estimator
from areal_ray.run import RunDir
from areal_ray.run.units import size_text
from areal_ray.tools.doctor import device_levers, host_levers


def hint(cause: Cause, config: Config, run: RunDir) -> str | None:
    """What to do about a failure, for the kinds that people meet again and again; None for all others.

    Args:
        cause: of the failure.
        config: of the run, checked.
        run: its ledger says how many workers there were, and which were stuck.
    """
    text = f"{cause.kind}: {cause.message}"
    tell = next((tell for pattern, tell in _HINTS if pattern.search(text)), None)
    if tell is None:
        return None
    try:
        return tell(config, run)
    except Exception as error:  # noqa: BLE001  (the panel matters more: numbers of a model of one's own may fail)
        return f"areal-ray doctor, for a hint that could not be made: {type(error).__name__}: {error}"


def _device_memory(config: Config, run: RunDir) -> str:
    workers, needs = _workers(config, run), estimator(config)
    device = needs(config, workers).device
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in device.items() if size)
    return (
        f"the device has too little memory: {workers} workers need about {size_text(sum(device.values()))} each "
        f"({parts}). {device_levers(config, workers, needs)}; a smaller train.seq_len (now {config.train.seq_len})"
    )


def _killed(config: Config, run: RunDir) -> str:
    return f"the machine has too little memory, and something was killed to make room: {_host_memory(config, run)}"


def _not_allocated(config: Config, run: RunDir) -> str:
    return f"the machine has too little memory for what was asked of it: {_host_memory(config, run)}"


def _host_memory(config: Config, run: RunDir) -> str:
    workers, needs = _workers(config, run), estimator(config)
    found = needs(config, workers)
    parts = {**({} if config.cluster.use_gpu else found.device), **found.host}
    told = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    standbys = "" if config.standbys(1) == 0 else "; cluster.standbys=off, a process less for each worker"
    return (
        f"{workers} workers need about {size_text(sum(parts.values()))} each, beside their libraries ({told}). "
        f"{host_levers(config, workers, needs)}{standbys}; fewer workers a node"
    )


def _workers(config: Config, run: RunDir) -> int:
    """The number of workers that there were at the end; the fewest that may be, if nobody knows."""
    attempt = None
    with suppress(OSError):  # the storage may be why it failed
        attempt = run.newest("attempt")
    size = attempt.get("world_size") if attempt else None
    return size if size in config.usable_sizes else config.usable_sizes[0]


def _index(config: Config, run: RunDir) -> str:
    rows, positions = models.table_sizes(models.build_model(config.model))
    tokenizer = "that of the model" if config.data.tokenizer is None else repr(config.data.tokenizer)
    has = f"; the model has {rows:,} rows" if rows is not None else ""
    table = f"; it has {positions:,} positions" if positions is not None else ""
    return (
        f"an index is too large for a table: a token id beyond the rows of the embedding (tokenizer {tokenizer}{has}), "
        f"or a position beyond those that the model has (train.seq_len={config.train.seq_len}{table}). "
        "`areal-ray data sample` shows rows as they are trained on"
    )


def _not_finite(config: Config, run: RunDir) -> str:
    return (
        f"a number is not finite. A smaller optim.lr (now {config.optim.lr:g}), a longer optim.warmup_steps (now "
        f"{config.optim.warmup_steps}), optim.clip_grad_norm (now {config.optim.clip_grad_norm}); or let such steps be "
        "left out: train.bad_step.on_bad=skip"
    )


def _full(config: Config, run: RunDir) -> str:
    keep = config.checkpoint.keep.last
    fewer = f"checkpoint.keep.last={max(1, min(3, keep - 1)) if keep else 3}"
    return (
        f"{config.run.storage_path}, or a temporary folder, is full, or its quota used up: delete what is not needed "
        f"(`areal-ray ckpt ls` has the sizes, `areal-ray ckpt gc` deletes what no save has left), or keep fewer "
        f"checkpoints ({fewer}). The same command goes on from the last one"
    )


def _credentials(config: Config, run: RunDir) -> str:
    return (
        f"{config.run.storage_path} refuses the credentials: see run.s3, the AWS variables of every node, and how long "
        "a session's token is good for"
    )


def _late(config: Config, run: RunDir) -> str:
    stuck: list[str] = []
    with suppress(OSError):  # the storage may be why it failed
        events = [event for event in run.turning_points() if event["event"] == "stuck"]
        stuck = [
            f"rank {event['rank']} ({'waited' if event['waiting'] else 'did not'}) at {event['where']}"
            for event in events[-4:]
        ]
    which = f"their watchdogs saw {', '.join(stuck)}" if stuck else "no watchdog saw which one was late"
    return (
        f"a rank waited {config.cluster.collective_timeout_s:.0f} s for the others; {which}. Slow storage or data, a "
        "slow or broken machine (`straggler`, `bad_device` in the ledger), or ranks that take different turns in code "
        "of your own; where it only needs longer: cluster.collective_timeout_s"
    )


def _changed(config: Config, run: RunDir) -> str:
    return (
        "the data are not what the run has trained on so far: put the files, the tokenizer and train.seq_len back as "
        "they were, begin anew under another run.name, or go on with what there is now, by run.allow_changes='[data]'. "
        "Ranks that differ from each other see different files: data.paths must be the same on every node"
    )


def _shapes(config: Config, run: RunDir) -> str:
    return (
        "tensors do not fit each other, in the line that stands beside `at`. The model is given input_ids of shape "
        f"({config.train.micro_batch_size}, {config.train.seq_len}), the last micro-batch of a step perhaps with fewer "
        "rows, and is to give logits of that shape and a number for each word"
    )


def _died(config: Config, run: RunDir) -> str:
    return (
        "neither Ray nor the kernel says who has ended the process (where the kernel's log may not be read: "
        "`dmesg | grep -i killed` on that node). It is a `kill -9`, of a person or a batch system; or a crash of a "
        "library, of which its log's last lines tell; or memory, which `areal-ray doctor` lays beside every node's"
    )


# As S3 says it, and as Arrow does: ACCESS_DENIED.
_REFUSED = "|".join(
    word.replace(" ", "[ _]?")
    for word in (
        "Access Denied",
        "Invalid Access Key Id",
        "Signature Does Not Match",
        "No Credentials",
        "(Expired|Invalid)_?Token",  # in words it may be one of a text
        r"\b403\b",
    )
)
_HINTS: tuple[tuple[re.Pattern[str], Callable[[Config, RunDir], str]], ...] = tuple(
    (re.compile(pattern, re.I), tell)
    for pattern, tell in (
        (r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory", _device_memory),
        (r"for lack of memory|as memory of .* ran out", _killed),
        (r"DefaultCPUAllocator|Cannot allocate memory|^MemoryError", _not_allocated),
        (r"^(torch\.)?OutOfMemoryError", _device_memory),
        (r"^IndexError: index out of range in self|indexSelect|device-side assert|index .* is out of bounds", _index),
        (r"not finite|\bnan\b.*(loss|grad)|(loss|grad).*\bnan\b", _not_finite),
        (r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT", _full),
        (_REFUSED, _credentials),
        (r"Watchdog caught collective|collective.*tim|Timed out waiting \d+ms", _late),
        (r"not what the checkpoint was trained on|read other data than rank 0", _changed),
        (r"size mismatch|shapes cannot be multiplied|must match the size of tensor|shape .* is invalid", _shapes),
        (r"^the worker process died", _died),  # and nothing above says more
    )
)

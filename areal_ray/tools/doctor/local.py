"""Checks of the doctor that need no cluster."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator

from areal_ray import models
from areal_ray.config import Config
from areal_ray.run.units import size_text
from areal_ray.storage import Storage
from areal_ray.tools.doctor.finding import Finding
from areal_ray.tools.doctor.levers import Estimate, host_levers
from areal_ray.tools.doctor.limits import limits
from areal_ray.tools.doctor.memory import estimate


def local_findings(config: Config, storage: Storage, needs: Estimate | None = None) -> Iterator[Finding]:
    """What can be found on this machine, check by check.

    Args:
        config: checked.
        storage: of run.storage_path.
        needs: memory of one rank of so many; None: as `estimate` has it.
    """
    yield _sizes(config)
    if needs is None:
        model, _ = models.build_adapted(
            config.model, config.adapter, config.engine.precision or ""
        )  # once, for all levers
        yield from _memory(config, lambda changed, workers: estimate(changed, workers, model))
    else:
        yield from _memory(config, needs)
    yield _storage(storage)
    yield from limits()


def _sizes(config: Config) -> Finding:
    low, high = config.worker_range
    usable = config.usable_sizes
    left_out = [size for size in range(low, high + 1) if size not in usable]
    train = config.train
    odd = [size for size in usable if train.global_batch_size // size % train.micro_batch_size]
    text = f"a global batch of {train.global_batch_size} is shared by {_list(usable)} workers"
    if left_out:
        text += f"; not by {_list(left_out)}, which are passed over when machines come and go"
    if odd:
        text += f"; with {_list(odd)} the last micro-batch is smaller than {train.micro_batch_size}"
    return Finding("note" if left_out or odd else "ok", "number of workers", text)


def _memory(config: Config, needs: Estimate) -> Iterator[Finding]:
    workers = config.usable_sizes[0]  # the fewest have the most each
    found = needs(config, workers)
    trained = "" if found.trained == found.parameters else f", of which {found.trained:,} are trained"
    yield Finding("ok", "parameters", f"{found.parameters:,}{trained}")
    device, host = sum(found.device.values()), sum(found.host.values())
    where = "GPU" if config.cluster.use_gpu else "process"
    text = f"about {size_text(device)} in each {where} with {workers} workers ({_parts(found.device)})"
    if host:
        text += f", and {size_text(host)} of the host's memory ({_parts(found.host)})"
    yield Finding("ok", "memory of a worker", text)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = host + (0 if config.cluster.use_gpu else device)
    text = f"this machine has {size_text(have)}: room for {int(have // max(here, 1)):,} workers of this size"
    if here > have:
        yield Finding("bad", "memory of this machine", f"{text}. {host_levers(config, workers, needs)}")
    else:
        yield Finding("note" if here * workers > have else "ok", "memory of this machine", text)


def _storage(storage: Storage) -> Finding:
    name, content = f".areal_ray-doctor-{secrets.token_hex(4)}", secrets.token_bytes(1024)
    try:
        storage.ensure()
        storage.replace(name, content)
        same, listed = storage.read(name) == content, name in storage.names()
        storage.remove(name)
    except OSError as error:
        return Finding("bad", "storage", f"{storage.location}: {error}")
    if not (same and listed):
        return Finding("bad", "storage", f"{storage.location} gives back something else than was written")
    free = "" if "://" in storage.location else f", {size_text(shutil.disk_usage(storage.location).free)} free"
    return Finding("ok", "storage", f"{storage.location}: written, read, listed and deleted{free}")


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)


def _list(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes[:8])) + (f" ... {sizes[-1]}" if len(sizes) > 8 else "")

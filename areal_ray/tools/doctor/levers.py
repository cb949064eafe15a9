"""What brings the memory of a worker down, in the order in which to try it, with what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from areal_ray.config import Config
from areal_ray.run.units import size_text
from areal_ray.tools.doctor.memory import MemoryEstimate

Estimate = Callable[[Config, int], MemoryEstimate]


def device_levers(config: Config, workers: int, estimate: Estimate) -> str:
    """Levers for the memory of the device: overrides, each with what a worker then takes with those before it."""
    return _text(_of_device(config), config, workers, lambda c, n: sum(estimate(c, n).device.values()))


def host_levers(config: Config, workers: int, estimate: Estimate) -> str:
    """Levers for the host's memory; on a CPU that is all of it."""
    device = () if config.cluster.use_gpu else tuple(_of_device(config))

    def taken(changed: Config, count: int) -> int:
        needs = estimate(changed, count)
        return sum(needs.host.values()) + (0 if config.cluster.use_gpu else sum(needs.device.values()))

    return _text((*_of_host(config), *device), config, workers, taken)


_Lever = tuple[str, Callable[[Config], Config]]


def _of_device(config: Config) -> Iterator[_Lever]:
    size = config.train.micro_batch_size
    if size > 1:
        yield (
            f"train.micro_batch_size={size // 2}",
            lambda c: replace(c, train=replace(c.train, micro_batch_size=size // 2)),
        )
    if (how := config.engine.recomputed).every != 1 or how.keeps_products:
        yield (
            "engine.activation_checkpointing=true",
            lambda c: replace(c, engine=replace(c.engine, activation_checkpointing=True)),
        )
    if config.model.loss == "logits":
        yield "model.loss=chunked", lambda c: replace(c, model=replace(c.model, loss="chunked"))
    if config.engine.accumulate == "unsharded":
        yield (
            "engine.accumulate=sharded (in a new run)",
            lambda c: replace(c, engine=replace(c.engine, accumulate="sharded")),
        )
    if config.cluster.use_gpu and config.engine.offload == "none":
        yield "engine.offload=all", lambda c: replace(c, engine=replace(c.engine, offload="all"))
    if size > 2:
        yield "train.micro_batch_size=1", lambda c: replace(c, train=replace(c.train, micro_batch_size=1))


def _of_host(config: Config) -> Iterator[_Lever]:
    every = config.checkpoint
    if every.memory_partner:
        yield (
            "checkpoint.memory_partner=false",
            lambda c: replace(c, checkpoint=replace(c.checkpoint, memory_partner=False)),
        )
    if every.memory_every_steps is not None:
        yield (
            "checkpoint.memory_every_steps=null",
            lambda c: replace(c, checkpoint=replace(c.checkpoint, memory_every_steps=None, memory_partner=False)),
        )
    if config.engine.offload == "all":
        yield (
            "engine.offload=none (the GPU has it then)",
            lambda c: replace(c, engine=replace(c.engine, offload="none")),
        )


def _text(levers: Iterable[_Lever], config: Config, workers: int, taken: Callable[[Config, int], int]) -> str:
    """The levers as a list; what a worker takes is estimated, and stands behind each."""
    parts: list[str] = []
    for name, pull in levers:
        config = pull(config)
        parts.append(f"{name} (about {size_text(taken(config, workers))})")
    doubled = 2 * workers
    parts.append(f"more workers (about {size_text(taken(config, doubled))} with {doubled})")
    return f"In this order: {', '.join(parts)}"

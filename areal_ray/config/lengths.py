"""Lengths of a run and of its schedule: given in steps, samples or epochs, and used in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from omegaconf import DictConfig, OmegaConf

from areal_ray.config.errors import ConfigError
from areal_ray.config.schema import Config

# Names of the same length in different units; what is null or 0 is not given.
_UNITS = (
    ("train", ("steps", "samples", "epochs")),
    ("optim", ("warmup_steps", "warmup_samples", "warmup_epochs")),
    ("optim", ("decay_steps", "decay_samples", "decay_epochs")),
)


def keep_last_unit(layers: Sequence[tuple[str, DictConfig]]) -> None:
    """Take a length out of layers where a later one gives it in another unit, as if it had the same name.

    Args:
        layers: source and values of each, later ones winning.

    Raises:
        ConfigError: if one layer gives a length in two units.
    """
    for section, names in _UNITS:
        found = [(source, *_given(values, section, names)) for source, values in layers]
        chosen = [at for at, (_, _, given) in enumerate(found) if given]
        if not chosen:
            continue
        source, _, given = found[chosen[-1]]
        if len(given) > 1:
            text = f"is the same as {section}.{given[0]} in another unit: one of them must go"
            raise ConfigError(f"{section}.{given[1]}", text, source)
        for _, tree, _ in found[: chosen[-1]]:
            if tree is not None:
                for name in set(names) - set(given):
                    tree.pop(name, None)


def in_steps(config: Config, rows: int) -> Config:
    """The configuration with all lengths in steps, rounded up: a run sees all of what it is to see.

    Args:
        config: checked.
        rows: of the data to train on: an epoch is so many samples.

    Raises:
        ConfigError: if these lengths do not go together.
    """
    train, optim, batch = config.train, config.optim, config.train.global_batch_size

    def count(samples: int | None, epochs: float | None) -> int:
        exact = Fraction(samples or 0) if epochs is None else Fraction(repr(epochs)) * rows
        return math.ceil(exact / batch)

    if train.samples is not None or train.epochs is not None:
        train = replace(train, steps=count(train.samples, train.epochs), samples=None, epochs=None)
    if optim.warmup_samples is not None or optim.warmup_epochs is not None:
        steps = count(optim.warmup_samples, optim.warmup_epochs)
        optim = replace(optim, warmup_steps=steps, warmup_samples=None, warmup_epochs=None)
    if optim.decay_samples is not None or optim.decay_epochs is not None:
        steps = count(optim.decay_samples, optim.decay_epochs)
        optim = replace(optim, decay_steps=steps, decay_samples=None, decay_epochs=None)
    config = replace(config, train=train, optim=optim)
    check_lengths(config)
    return config


def check_lengths(config: Config) -> None:
    """Raise ConfigError if lengths do not go together, as far as they are known in steps."""
    train, optim = config.train, config.optim
    if not train.steps:
        if train.samples is None and train.epochs is None:
            raise ConfigError("train.steps", "must be greater than 0, not 0")
        return
    if train.stop_at is not None and not 0 < train.stop_at <= train.steps:
        raise ConfigError("train.stop_at", f"must be between 1 and train.steps={train.steps}, not {train.stop_at}")
    if not 0 <= optim.warmup_steps < train.steps:
        raise ConfigError("optim.warmup_steps", f"must be in [0, train.steps={train.steps}), not {optim.warmup_steps}")
    if optim.decay_steps is not None and not 0 < optim.decay_steps <= train.steps - optim.warmup_steps:
        most = f"train.steps - optim.warmup_steps = {train.steps - optim.warmup_steps}"
        raise ConfigError("optim.decay_steps", f"must be between 1 and {most}, not {optim.decay_steps}")
    for i, fault in enumerate(config.faults):
        if not 0 < fault.step <= train.steps:
            raise ConfigError(f"faults[{i}].step", f"must be between 1 and {train.steps}, not {fault.step}")


def _given(values: DictConfig, section: str, names: Sequence[str]) -> tuple[DictConfig | None, list[str]]:
    """The section of a layer, and which of these names have a value in it."""
    tree = OmegaConf.select(values, section, throw_on_resolution_failure=False)
    if not isinstance(tree, DictConfig):
        return None, []
    plain = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(plain, dict)
    return tree, [name for name in names if plain.get(name) not in (None, 0)]

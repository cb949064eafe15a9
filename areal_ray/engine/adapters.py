"""What a run with an adapter says of its base, and what it makes sure of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from areal_ray.config import Config, ConfigError, redact


def described(config: Config, base: Mapping[str, Any], parameters: int, trained: int) -> dict[str, Any]:
    """What belongs to the checkpoints of an adapter, for the manifest: its base by place and fingerprint.

    Args:
        config: of the run.
        base: see `ShardedModel.base`.
        parameters, trained: numbers of them, in all and the adapter's.
    """
    assert config.adapter is not None
    about = {"base": dict(base), "parameters": parameters, "trained": trained}
    return {**redact(asdict(config.adapter)), **about}


def check_base(config: Config, base: Mapping[str, Any] | None, saved: str | None) -> None:
    """Compare the fingerprint of the base that is there with that of the checkpoint that is loaded next.

    Args:
        config: of the run.
        base: see `ShardedModel.base`.
        saved: what it must be; None: anything.

    Raises:
        ConfigError: if they differ.
    """
    now = None if base is None else base["fingerprint"]
    if saved is not None and now != saved:
        raise other_base(config, saved, now)


def other_base(config: Config, saved: str, now: str | None) -> ConfigError:
    """What is wrong if the base is not that of the checkpoints, by its two fingerprints."""
    key, what = "model.path", f"the weights in {config.model.path!r}"
    if not config.model.path:
        key, what = "run.seed", f"the base, drawn from seed {config.run.seed},"
    text = f"{what} are not those that this run's adapter was trained on: their fingerprint was {saved} and is {now}"
    return ConfigError(key, f"{text}; choose another run.name, or go back, or say run.allow_changes='[{key}]'")

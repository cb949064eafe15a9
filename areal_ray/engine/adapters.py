"""What a run with an adapter says of its base, and what it makes sure of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from areal_ray.config import Config, ConfigError, redact


def described(config: Config, base: str, parameters: int, trained: int) -> dict[str, Any]:
    """What belongs to the checkpoints of an adapter, for the manifest: its base by place and fingerprint.

    Args:
        config: of the run.
        base: fingerprint.
        parameters, trained: numbers of them, in all and the adapter's.
    """
    assert config.adapter is not None
    place = {"path": config.model.path} if config.model.path else {"drawn_from_seed": config.run.seed}
    about = {"base": {**place, "fingerprint": base}, "parameters": parameters, "trained": trained}
    return {**redact(asdict(config.adapter)), **about}


def check_base(config: Config, base: str | None, saved: str | None) -> None:
    """Compare the fingerprint of the base that is there with that of the checkpoint that is loaded next.

    Args:
        config: of the run.
        base: of the base as it was read or drawn; None: there is no adapter.
        saved: what it must be; None: anything.

    Raises:
        ConfigError: if they differ.
    """
    if saved is None or base == saved:
        return
    key, what = "model.path", f"the weights in {config.model.path!r}"
    if not config.model.path:
        key, what = "run.seed", f"the base, drawn from seed {config.run.seed},"
    text = f"{what} are not those that this run's adapter was trained on: their fingerprint was {saved} and is {base}"
    raise ConfigError(key, f"{text}; choose another run.name, or go back, or say run.allow_changes='[{key}]'")

"""First weights as the driver sees them: what lies at model.path, which model it is of, which tokenizer it knows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from areal_ray.config import Config, ConfigError, ModelConfig
from areal_ray.engine import Objective, first_weights
from areal_ray.engine.first_weights import Resolved


def says_what_it_is(model: ModelConfig) -> bool:
    """Whether a resolved model is all that its path says: a Hugging Face directory or name on the hub."""
    return bool(model.path) and not (model.config or model.factory)


def with_first_weights(config: Config, saved: Mapping[str, Any]) -> Config:
    """A configuration in which model.path, the model and the tokenizer are settled for the life of the run.

    Args:
        config: as loaded.
        saved: info of the run's newest checkpoint, if it goes on: what was settled then stays.

    Raises:
        ConfigError: if nothing can be read from that path, or more must be said.
    """
    model = config.model
    if model.path is None:
        return config
    before = (saved.get("config") or {}).get("model")
    known = first_weights.as_before(model, before) if isinstance(before, dict) else model
    settled = isinstance(before, dict) and known.path == before.get("path")
    if settled and (known.path != model.path or known.config or known.factory):  # and it need not be there any more
        found = Resolved(known, saved.get("tokenizer"))
    else:
        found = first_weights.resolve(known, lambda text: print(text, flush=True))
    return replace(config, model=found.model, data=replace(config.data, tokenizer=_tokenizer(config, found)))


def read_at_each_start(config: Config, objective: Objective) -> str | None:
    """What to say of first weights that must stay where they are as long as the run is to go on; None if they need not.

    Args:
        config: with its first weights settled.
        objective: of the run; whether it asks frozen models, and which.
    """
    model = config.model
    frozen = [name for name in objective.references if name not in objective.reference_models]
    if model.path is None or not (config.adapter or (frozen and not objective.once)):
        return None
    why = "the adapter's base" if config.adapter else f"the objective's {' and '.join(frozen)}"
    places = " and ".join(filter(None, [model.path, model.merge_adapter]))
    text = f"every start of this run reads {places} again, {why}: keep it as it is"
    checkpoint = os.path.basename(model.path).startswith("step-") and model.config
    return f"{text}; that run's checkpoint.keep may delete it, a copy elsewhere stays" if checkpoint else text


def _tokenizer(config: Config, found: Resolved) -> str | None:
    """The one of the configuration; where nothing is said there, that of the weights."""
    given, path = config.data.tokenizer, config.model.path
    assert path
    if found.tokenizer is None:
        return given
    unsaid = given == path
    if unsaid and not (found.by_checkpoint and found.tokenizer != "bytes"):
        own = os.path.isfile(os.path.join(path, "tokenizer_config.json"))  # of an adapter
        return path if own and not found.by_checkpoint else found.tokenizer
    if unsaid:
        text = (
            f"the run that saved {found.model.path} had {found.tokenizer!r}, and what a checkpoint names is not loaded"
        )
        raise ConfigError("data.tokenizer", f"{text} unasked: say data.tokenizer={shlex.quote(found.tokenizer)}")
    other = found.by_checkpoint and given != found.tokenizer and "bytes" in (given, found.tokenizer)
    if other and not config.data.allow_other_tokenizer:
        text = f"{given} is not the tokenizer of {found.model.path}, which was trained with {found.tokenizer}"
        raise ConfigError("data.tokenizer", f"{text}; or say data.allow_other_tokenizer=true")
    return given

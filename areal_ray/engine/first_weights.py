"""First weights of a run: what lies at model.path, and how its tensors are opened.

A path is that of a Hugging Face model, of an adapter of peft on one, of a run or a checkpoint of this package, or of a
directory that others wrote with torch's `dcp.save`. No pickle is run, whatever it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from areal_ray import models
from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, StoredState, read_manifest
from areal_ray.checkpoint.foreign import ForeignState
from areal_ray.checkpoint.format.manifest import MANIFEST, METADATA
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.config import ConfigError, ModelConfig
from areal_ray.distributed import RankError, Ranks
from areal_ray.models import merged_adapter, weight_source
from areal_ray.models.lazy_tensor import stored_tensors
from areal_ray.models.merged_adapter import MergedAdapter
from areal_ray.models.weight_source import Fitted, WeightSource, shortened
from areal_ray.storage import Storage, storage_at

_PREFIX = "engine.model."  # of the weights among the tensors of a checkpoint
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 5


@dataclass(frozen=True)
class Resolved:
    """A model's configuration with nothing left open that depends on what lies at model.path.

    Args:
        model: its path is that of one checkpoint, where it was that of a run, and config says what model it is; or of
            an adapter's base.
        tokenizer: the name of the one that the weights know, if what lies there says so; None: it does not.
        by_checkpoint: whether it is a checkpoint that says so.
    """

    model: ModelConfig
    tokenizer: str | None = None
    by_checkpoint: bool = False


def resolve(model: ModelConfig, say: Callable[[str], None]) -> Resolved:
    """Look at model.path, and settle what depends on it. Once, before any worker starts: a run saves on meanwhile.

    Args:
        model: as configured; one that was resolved stays as it is.
        say: prints a line for the user.

    Raises:
        ConfigError: if there is nothing there that weights can be read from, or it must be said what model it is.
    """
    if model.path is None:
        return Resolved(model)
    if model.path.startswith("~"):
        model = replace(model, path=os.path.expanduser(model.path))
    assert model.path is not None
    if os.path.isfile(os.path.join(model.path, merged_adapter.CONFIG)):
        return _on_its_base(model, model.path, say)
    try:
        directory = _not_of_files(model.path)
        if directory is None:
            return Resolved(model)
        if (manifest := _manifest(directory)) is not None:
            return _of_checkpoint(model, manifest)
        if Catalog(directory).names():
            newest = Catalog(directory).newest()
            if newest is None or newest.manifest is None:
                raise ConfigError("model.path", f"{directory.location} holds a run without a good checkpoint")
            say(f"first weights: those of {newest.name} in {directory.location}")
            return _of_checkpoint(replace(model, path=directory.sub(newest.name).location), newest.manifest)
        _check_is_dcp(directory)
    except (OSError, ValueError, CheckpointDamaged) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("model.path", f"{model.path}: {error}") from None
    if not (model.config or model.factory):
        text = f"{model.path} is a DCP checkpoint, which does not say what model it is of: give model.config, too"
        raise ConfigError("model.config", f"{text} (a transformers config), or model.factory")
    return Resolved(model)


def source_of(model: ModelConfig) -> WeightSource:
    """The source of the first weights of a resolved configuration; nothing is opened.

    Raises:
        ValueError: if model.merge_adapter cannot be added.
    """
    assert model.path is not None
    directory = _not_of_files(model.path)
    if directory is None:
        source = weight_source.of_directory(model.path)
    elif directory.size(MANIFEST) is not None:
        source = WeightSource(
            model.path, partial(_open_checkpoint, directory), of_files=False, lock=partial(read_lock, directory)
        )
    else:
        source = WeightSource(model.path, partial(_open_foreign, directory), of_files=False)
    return replace(
        source,
        names=model.names,
        allow_missing=model.allow_missing,
        allow_unused=model.allow_unused,
        adapter=None if model.merge_adapter is None else MergedAdapter.read(model.merge_adapter),
    )


def examine(model: ModelConfig, say: Callable[[str], None], ranks: Ranks) -> ModelConfig:
    """See that the weights at model.path are this model's, and settle whether it is tied. A collective.

    Nothing is read but what describes them, and, of a model with one matrix for head and embedding, both where there
    are two, to their first difference.

    Args:
        model: resolved, with a path.
        say: prints a line for the user.
        ranks: all ranks; the driver, before any of them starts, is one by itself.

    Raises:
        ConfigError: on every rank, if they are of another model, or cannot be read.
    """
    found = fitted(model, ranks)
    if found.missing:
        say(f"not in {model.path}, drawn from run.seed: {_counted(found.missing)}")
    if found.unused:
        say(f"in {model.path} and not used: {_counted(found.unused)}")
    if model.tie is not None:
        return model
    differing = ranks.on_rank_zero(found.differing)
    if differing is None:  # settled, so that no worker asks again
        return model if model.factory else replace(model, tie=models.is_tied(models.build_model(model)))
    if model.factory:
        text = f"{model.path} has different values for {' and '.join(differing)}, which the model takes for one weight"
        raise ConfigError("model.path", text)
    say(
        f"the config ties {' and '.join(differing)}, but {model.path} has different values for them: they are NOT tied "
        "here, as in transformers; model.tie=true takes the embedding for both, model.tie=false says nothing more"
    )
    untied = replace(model, tie=False)
    if ranks.on_rank_zero(fitted(untied, ranks).differing) is not None:
        raise ConfigError("model.tie", f"{' and '.join(differing)} cannot be parted in this model")
    return untied


def fitted(model: ModelConfig, ranks: Ranks) -> Fitted:
    """What of the weights at model.path a resolved model takes. A collective.

    Raises:
        ConfigError: on every rank, if they are of another model, or cannot be read.
    """
    try:
        return source_of(model).fit(models.build_model(model), ranks)
    except ConfigError:
        raise
    except (ValueError, OSError, RankError, CheckpointDamaged) as error:
        # Of one rank; without the kind of the error.
        text = error.failures[0][1].partition(": ")[2] if isinstance(error, RankError) else str(error)
        raise ConfigError("model.path", text) from None


def _on_its_base(model: ModelConfig, path: str, say: Callable[[str], None]) -> Resolved:
    try:
        base = MergedAdapter.read(path).base
    except ValueError as error:
        raise ConfigError("model.path", str(error)) from None
    if model.config or model.factory or model.merge_adapter:
        text = f"{path} is an adapter of peft: give model.path=BASE and model.merge_adapter={path}"
        raise ConfigError("model.path", text)
    if base is None:
        text = f"the adapter in {path} does not name its base: give model.path=BASE and model.merge_adapter={path}"
        raise ConfigError("model.path", text)
    say(f"first weights: those of {base}, which {path} names as its base, with this adapter added")
    on_base = resolve(replace(model, path=base, merge_adapter=path), say)
    return replace(on_base, tokenizer=on_base.tokenizer or base)


def _of_checkpoint(model: ModelConfig, manifest: Manifest) -> Resolved:
    """A configuration whose path is that of a checkpoint, with the architecture that its manifest names."""
    said = manifest.info.get("tokenizer")
    tokenizer = said if isinstance(said, str) else None
    if model.config or model.factory:
        return Resolved(model, tokenizer, by_checkpoint=True)
    config = manifest.info.get("hf_config")
    if not config or "model_type" not in config:
        text = f"{model.path} does not say which transformers model it is of: give model.factory, or model.config"
        raise ConfigError("model.config", text)
    return Resolved(replace(model, config=dict(config)), tokenizer, by_checkpoint=True)


def _not_of_files(path: str) -> Storage | None:
    """The directory at a path; None if it is a name on the hub, or a directory of safetensors."""
    if "://" not in path and not os.path.isdir(path):
        return None
    directory = storage_at(path)
    names = directory.names()
    described = MANIFEST in names or METADATA in names
    return None if not described and any(name.endswith(".safetensors") for name in names) else directory


def _manifest(directory: Storage) -> Manifest | None:
    return read_manifest(directory) if directory.size(MANIFEST) is not None else None


def _check_is_dcp(directory: Storage) -> None:
    """Raise ConfigError for a directory that is none of those that can be read, with what may have been meant."""
    if directory.size(METADATA) is not None:
        return
    names, where = directory.names(), directory.location
    if inner := [name for name in names if directory.sub(name).size(METADATA) is not None]:
        raise ConfigError("model.path", f"{where} holds several checkpoints: give one of them, {inner[-1]} for example")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        text = f"{where} has {pickles[0]}, which is a pickle and could run anything: save it as safetensors first"
        raise ConfigError("model.path", text)
    text = "no Hugging Face directory, adapter of peft, run, checkpoint or DCP directory"
    raise ConfigError("model.path", f"{where} is {text}")


def _open_checkpoint(directory: Storage, ranks: Ranks) -> Mapping[str, torch.Tensor]:
    return stored_tensors(StoredState.open(directory, ranks), _PREFIX)


def _open_foreign(directory: Storage, ranks: Ranks) -> Mapping[str, torch.Tensor]:
    return stored_tensors(ForeignState.open(directory, ranks), "")


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({shortened(names)})" if len(names) > 1 else shortened(names)


def as_before(model: ModelConfig, saved: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a run that goes on, with what was settled at its first start; nothing is looked at.

    Args:
        model: as configured; with another path than then it stays as it is, but for ties. The same path, written in
            whatever way, and that of the run or adapter that stood for it are taken for what they were.
        saved: the model's part of the configuration in the manifest of one of the run's checkpoints.
    """
    if model.path is None:
        return model
    if model.tie is None and not model.factory:
        model = replace(model, tie=saved.get("tie"))
    assert model.path is not None
    path, adapter = saved.get("path"), saved.get("merge_adapter")
    if not isinstance(path, str):
        return model
    now, then = _place(model.path), _place(path)
    of_adapter = isinstance(adapter, str) and now == _place(adapter)
    of_run = now == os.path.dirname(then) and os.path.basename(then).startswith("step-")
    if not (of_adapter or of_run or now == then):
        return model
    return replace(
        model,
        path=path,
        merge_adapter=adapter if of_adapter else model.merge_adapter,
        config=model.config or ({} if model.factory else saved.get("config") or {}),
    )


def _place(path: str) -> str:
    """What two ways of writing one place have in common, whether anything is there or not."""
    return path.rstrip("/") if "://" in path else os.path.realpath(os.path.expanduser(path))


def settle(model: ModelConfig, weights: bool, ranks: Ranks) -> ModelConfig:
    """The same, resolved and examined by rank 0 unless a driver has done so. A collective.

    Args:
        model: as configured.
        weights: whether they are about to be read.
        ranks: all ranks.

    Raises:
        RankError, ConfigError: on every rank, as `resolve` and `examine` raise.
    """
    if model.path is None or not (weights or not (model.config or model.factory)):
        return model

    found = ranks.on_rank_zero(lambda: resolve(model, print).model)
    if not weights or found.tie is not None or found.factory:
        return found
    return examine(found, print if ranks.rank == 0 else lambda _: None, ranks)

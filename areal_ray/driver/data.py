"""The data of a run: the prepared corpus that it goes on with, or one that is prepared now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from typing import Any

import ray

from areal_ray.config import EVALUATION, Config, ConfigError, DataConfig, SourceConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.build import build_renderer, build_source
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.corpus import Corpus, TokenSource
from areal_ray.data.corpus.manifest import Manifest
from areal_ray.data.corpus.process_prepare import ProcessPool
from areal_ray.data.splits import open_source
from areal_ray.data.tokenizers import Tokenizer
from areal_ray.driver.connect import cluster
from areal_ray.driver.first_weights import with_first_weights
from areal_ray.run import RunDir
from areal_ray.storage import Storage, storage_at

Say = Callable[[str], None]
Make = Callable[[Config, planning.Plan, Say], None]


class NotPrepared(Exception):
    """Raised by `leave_unprepared`.

    Args:
        bytes: of the sources that are to be prepared.
        config: that they are of, with its model and tokenizer as they were settled before.
    """

    def __init__(self, bytes: int, config: Config) -> None:
        super().__init__(f"{bytes} bytes of sources are not prepared")
        self.bytes, self.config = bytes, config


def leave_unprepared(config: Config, plan: planning.Plan, say: Say) -> None:
    """A Make for who only looks: raises NotPrepared."""
    raise NotPrepared(plan.bytes, config)


def make_corpus(config: Config, plan: planning.Plan, say: Say) -> None:
    """A Make that prepares a corpus: in this process if its sources are small, else with all cores there are.

    Those of the cluster's nodes, if there is one, else of this machine: to start a cluster for it takes longer than
    some of the work.
    """
    limit = config.data.prepare_in_process_mb
    what = f"preparing data: {plan.bytes / 1e6:,.0f} MB in {len(plan.groups)} parts"
    if len(plan.groups) == 1 or plan.bytes <= limit * 1_000_000:
        manifest = prepare.prepare(plan, prepare.in_process, say)
    elif ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        from areal_ray.driver.ray_prepare import on_cluster

        say(f"{what}, with Ray Data")
        with nullcontext() if ray.is_initialized() else cluster(config):
            manifest = prepare.prepare(plan, on_cluster, say)
    else:
        say(f"{what}, in processes of this machine")
        manifest = prepare.prepare(plan, ProcessPool(say), say)
    sources, skipped = manifest.sources, manifest.sources["skipped"]
    left_out = "".join(f", {count:,} {reason}" for reason, count in skipped.items())
    tokens = sum(manifest.count(split, "tokens") for split in manifest.splits)
    counts = f"{sources['documents']:,} documents, {tokens:,} tokens{left_out}"
    say(f"prepared data: {counts}; in {plan.work.storage.location}")


def sources_of(
    config: Config, run: RunDir, tokenizer: Tokenizer, goes_on: bool, say: Say, make: Make = make_corpus
) -> dict[str, TokenSource]:
    """The tokens of a run, by the name of their corpus (`Config.corpora`); what is not prepared yet is prepared.

    A run that goes on does so with the corpora that it was started with, whatever has become of their sources, unless
    config.data has changed or run.allow_changes has `data`.

    Args:
        config: with an absolute storage path.
        run: the run directory.
        tokenizer: of config.data.tokenizer.
        goes_on: whether there is a checkpoint to go on from.
        say: prints a line.
        make: prepares a corpus.

    Raises:
        ConfigError: if a source cannot be read, or data.prepared_path is a corpus of something else.
    """
    recorded = (run.data() or {}) if goes_on and "data" not in config.run.allow_changes else {}
    found: dict[str, TokenSource] = {}
    for name, data in config.corpora.items():
        one = _alone(config, name, data)
        with _named(name):
            source = open_source(data, asdict(config.run.s3))
            if source is None and name in recorded and (old := _recorded(one, recorded[name], tokenizer)) is not None:
                _tell_if_newer(one, old.manifest, say)
                source = old
            found[name] = source or prepared_corpus(one, tokenizer, say, make)
    return found


def prepare_all(config: Config, say: Say) -> None:
    """Prepare what a run of this configuration would train on, and say where it is; for `areal-ray prepare`."""
    if not config.corpora:
        raise ConfigError("data.source", f"{config.data.source} prepares its rows itself")
    config = with_first_weights(config, {})
    tokenizer = build_tokenizer(config.data.tokenizer)
    for name, data in config.corpora.items():
        source = open_source(data, asdict(config.run.s3))
        source = source or prepared_corpus(_alone(config, name, data), tokenizer, say)
        held = f"{source.about('train')} to train on, {source.about('held_out')} held out"
        say(f"{f'{name}: ' if name else ''}{held}, {source.location}")


def _alone(config: Config, name: str, data: DataConfig) -> Config:
    """The configuration as if one of its corpora were all of its data."""
    if name.startswith(EVALUATION) and data.prepared_path is not None and prepare.is_prepared(corpora(config)):
        data = replace(data, prepared_path=None)  # that one is the corpus to train on, and no folder of several
    return replace(config, data=data)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A context in which mistakes in the data of an evaluation set are told under its key."""
    try:
        yield
    except ConfigError as error:
        _, _, key = error.key.partition(".")
        if not name.startswith(EVALUATION) or key not in {each.name for each in fields(SourceConfig)}:
            raise
        raise ConfigError(f"eval.sets.{name.removeprefix(EVALUATION)}.{key}", error.message) from None


def prepared_corpus(config: Config, tokenizer: Tokenizer, say: Say, make: Make = make_corpus) -> Corpus:
    """The corpus of a single source as it is now; it is prepared if it is not there."""
    folder = corpora(config)
    try:
        if prepare.is_prepared(folder):
            return _as_configured(config, Corpus(folder), tokenizer)
        plan = planning.make_plan(config.data, tokenizer, folder, asdict(config.run.s3))
        if not prepare.is_prepared(plan.work.storage):
            make(config, plan, say)
        return Corpus(plan.work.storage)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError("data.prepared_path", str(error)) from None


def corpora(config: Config) -> Storage:
    """Where prepared corpora lie, each in a folder named by its settings and sources; or a single one."""
    s3 = asdict(config.run.s3)
    try:
        if config.data.prepared_path is not None:
            return storage_at(config.data.prepared_path, s3)
        return storage_at(config.run.storage_path, s3).sub("data")
    except ValueError as error:
        raise ConfigError(
            "data.prepared_path" if config.data.prepared_path else "run.storage_path", str(error)
        ) from None


def noted(config: Config, sources: dict[str, TokenSource]) -> dict[str, dict[str, Any]]:
    """What is noted of the sources in a run's directory, by their names, for `sources_of` and the workers."""
    return {
        name: {
            "path": source.location,
            "fingerprint": source.fingerprint,
            "settings": planning.settings_of(config.corpora[name]),
        }
        for name, source in sources.items()
    }


def _recorded(config: Config, recorded: dict[str, Any], tokenizer: Tokenizer) -> Corpus | None:
    """The corpus that the run was started with; None if it is gone, or was prepared in another way than now."""
    try:
        corpus = Corpus(storage_at(recorded["path"], asdict(config.run.s3)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # another one in its place would be other data
        text = f"the corpus that the run was started with cannot be read: {error}"
        raise ConfigError("data.prepared_path", text) from None
    # Those of the run: other paths to the same files have led to the same corpus.
    same = planning.settings_of(config.data) == recorded.get("settings", corpus.manifest.settings)
    same = same and build_renderer(config.data, tokenizer).fingerprint == corpus.manifest.renderer
    return corpus if same and corpus.fingerprint == recorded["fingerprint"] else None


def _as_configured(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """A corpus that is named itself: its sources need not be there, but it must be one of such sources."""
    now, then = planning.settings_of(config.data), corpus.manifest.settings
    for name in sorted({*now, *then} - {"paths"}):
        if now.get(name) != then.get(name):
            text = f"{corpus.storage.location} was prepared with data.{name}={then.get(name)}, not {now.get(name)}"
            raise ConfigError("data.prepared_path", text)
    if build_renderer(config.data, tokenizer).fingerprint != corpus.manifest.renderer:
        text = f"{corpus.storage.location} was prepared with another tokenizer, or another version of its files"
        raise ConfigError("data.prepared_path", text)
    return corpus


def _tell_if_newer(config: Config, manifest: Manifest, say: Say) -> None:
    if config.data.source == "hub":  # to look at it would be to download it
        return
    go_on = "the run goes on with the corpus that it was started with"
    try:
        listing = planning.listing_of(build_source(config.data, asdict(config.run.s3)).parts())
    except (ConfigError, OSError) as error:
        say(f"data: the sources cannot be looked at ({error}); {go_on}")
        return
    if listing != manifest.sources["listing"]:
        say(f"data: the sources have changed since they were prepared; {go_on}")

"""The data of a configuration: rows to train on and held-out rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from areal_ray.config import EVALUATION, ConfigError, DataConfig, plugin
from areal_ray.data.corpus.corpus import Corpus, TokenSource
from areal_ray.data.corpus.manifest import SPLITS
from areal_ray.data.corpus.megatron import MegatronPairs
from areal_ray.data.dataset import TokenDataset
from areal_ray.data.mixture import MixedRows
from areal_ray.data.packing import build_rows
from areal_ray.data.tokenizers import Tokenizer
from areal_ray.storage import LocalStorage, Storage

Splits = tuple[TokenDataset, TokenDataset]


def open_source(config: DataConfig, s3: Mapping[str, str | None] | None = None) -> TokenSource | None:
    """The tokens of a source that takes no preparation, as others have prepared it; None: it takes one.

    Args:
        config: of one source.
        s3: as for `storage_at`.

    Raises:
        ConfigError: if there are none, or they are not what the source says.
    """
    if config.source == "megatron":
        return MegatronPairs(config.paths, config.held_out_paths, config.held_out, s3)
    if config.source == "datasets":
        from areal_ray.data.corpus.arrow import ArrowTokens  # brings pyarrow

        return ArrowTokens(config.paths, config.held_out_paths, config.held_out)
    return None


def open_splits(config: DataConfig, sources: Mapping[str, TokenSource], seq_len: int) -> Splits:
    """The rows of tokens that are there: to train on, and held out. Reads nothing.

    Args:
        config: of the data.
        sources: by name, those of `config.sources`; others among them are left alone.
        seq_len: tokens per row.
    """
    settings, weights = config.sources, {each.name: each.weight for each in config.mixture}
    train, held_out = (
        {
            name: build_rows(settings[name], source.split(split), seq_len, source.old_dtype)
            for name, source in sources.items()
            if name in settings
        }
        for split in SPLITS
    )
    if not weights:
        return train[""], held_out[""]
    if empty := [name for name, rows in train.items() if not len(rows)]:
        raise ConfigError("data.mixture", f"{empty[0]} has no row of train.seq_len={seq_len} tokens: give it more text")
    # Of a source that holds nothing out nothing is evaluated.
    some = {name: rows for name, rows in held_out.items() if len(rows)} or held_out
    return MixedRows(train, weights), MixedRows(some, weights)


def open_set(config: DataConfig, source: TokenSource, seq_len: int) -> TokenDataset:
    """The rows of an evaluation set: all of its documents. Reads nothing.

    Args:
        config: of the set, which holds nothing out.
        source: its tokens.
        seq_len: tokens per row.
    """
    return build_rows(config, source.split("train"), seq_len, source.old_dtype)


def open_sets(
    sets: Mapping[str, DataConfig], sources: Mapping[str, TokenSource], tokenizer: Tokenizer, seq_len: int, batch: int
) -> dict[str, TokenDataset]:
    """The rows of evaluation sets, by their names.

    Args:
        sets: as in `Config.evaluation_sets`.
        sources: by the names of `Config.corpora`; none for a set whose source is one's own, of which the held-out rows
            are taken.
        tokenizer: for that one.
        seq_len, batch: tokens per row and rows per global batch.

    Raises:
        ConfigError: if a set has too little for one global batch.
    """
    found: dict[str, TokenDataset] = {}
    for name, config in sets.items():
        source = sources.get(f"{EVALUATION}{name}")
        if source is not None:
            rows = open_set(config, source, seq_len)
        else:
            rows = own_splits(config, tokenizer, seq_len, f"eval.sets.{name}")[1]
        if len(rows) < batch:
            about = f"{len(rows)} rows" if source is None else source.about("train")
            text = f"{about} give {len(rows)} sequences of train.seq_len={seq_len} tokens, but a global batch takes"
            raise ConfigError(f"eval.sets.{name}.paths", f"{text} {batch}: give more, or smaller sizes")
        found[name] = rows
    return found


def own_splits(config: DataConfig, tokenizer: Tokenizer, seq_len: int, key: str = "data") -> Splits:
    """The rows of a source of one's own, which is called as `source(tokenizer, seq_len, **data.args)`.

    Args:
        config: of the source.
        tokenizer, seq_len: that it is given.
        key: where it stands in the configuration.

    Raises:
        ConfigError: if it fails, or returns something else.
    """
    source = plugin.factory(config.source, f"{key}.source", {})
    made = plugin.call(source, config.source, f"{key}.args", tokenizer, seq_len, **config.args)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ConfigError(f"{key}.source", f"{config.source} must return two data sets: (train, held out)")
    for split in made:
        if lacks := [name for name in ("__len__", "__getitem__", "fingerprint") if not hasattr(split, name)]:
            raise ConfigError(f"{key}.source", f"{config.source}: a {type(split).__name__} has no {lacks[0]}")
    train, held_out = made
    return train, held_out


def check_sizes(
    splits: Splits, config: DataConfig, sources: Mapping[str, TokenSource], seq_len: int, batch: int
) -> None:
    """Raise ConfigError if there is too little for one global batch of each; nothing held out is a choice, too.

    Args:
        splits: rows to train on and held out.
        config: of the data.
        sources: that the rows are from; none for a source of one's own.
        seq_len, batch: tokens per row and rows per global batch.
    """
    for side, name, split in (("train on", "train", splits[0]), ("hold out", "held_out", splits[1])):
        holds_out = any(each.held_out or each.held_out_paths for each in config.sources.values())
        if name == "held_out" and sources and not holds_out:
            continue
        if len(split) < batch:
            found = " and ".join(source.about(name) for source in sources.values()) or f"{len(split)} rows"
            hint = "give more text or smaller sizes"
            if sources and name == "held_out":
                hint += ", or hold more out (data.held_out)"
            raise ConfigError(
                "data.paths" if config.paths else "data.source",
                f"{found} to {side} give {len(split)} sequences of train.seq_len={seq_len} tokens, "
                f"but a global batch takes {batch}: {hint}",
            )


def load_splits(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, global_batch_size: int, folder: Storage | None = None
) -> Splits:
    """The data to train on and the held-out data, prepared first if they are not yet: for scripts without a driver.

    A training job prepares in its driver (areal_ray/driver/data.py), and its workers open what there is.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.
        seq_len: tokens per row.
        global_batch_size: rows per global batch.
        folder: where prepared corpora lie; None: in a temporary one, for as long as the rows are used.

    Raises:
        ConfigError: if there is too little for one global batch of each, or one's own source fails.
    """
    from areal_ray.data.corpus import planning, prepare

    if plugin.is_plugin(config.source):
        splits = own_splits(config, tokenizer, seq_len)
        check_sizes(splits, config, {}, seq_len, global_batch_size)
        return splits
    temporary = None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="areal_ray-data-")
        folder = LocalStorage(temporary.name)
    sources: dict[str, TokenSource] = {}
    for name, each in config.sources.items():
        found = open_source(each)
        if found is None:
            plan = planning.make_plan(each, tokenizer, folder)
            prepare.prepare(plan, prepare.in_process, print)
            found = Corpus(plan.work.storage)
        sources[name] = found
    splits = open_splits(config, sources, seq_len)
    check_sizes(splits, config, sources, seq_len, global_batch_size)
    for split in splits:
        split.folder = temporary  # type: ignore[attr-defined]  # removed with the rows
    return splits

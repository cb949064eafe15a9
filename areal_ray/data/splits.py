"""The data of a configuration: rows to train on and held-out rows."""

from __future__ import annotations

import tempfile
from typing import Any

from areal_ray.config import ConfigError, DataConfig, plugin
from areal_ray.data.corpus.corpus import Corpus
from areal_ray.data.dataset import TokenDataset
from areal_ray.data.packing import ConcatenatedRows
from areal_ray.data.tokenizers import Tokenizer
from areal_ray.storage import LocalStorage, Storage

Splits = tuple[TokenDataset, TokenDataset]


def open_splits(corpus: Corpus, seq_len: int) -> Splits:
    """The rows of a prepared corpus: to train on, and held out. Reads nothing.

    Args:
        corpus: whose tokens they are.
        seq_len: tokens per row.
    """
    # Before corpora were prepared, tokens of bytes had 16 bits and all others 32.
    old = "<u2" if corpus.manifest.settings.get("tokenizer") == "bytes" else "<u4"
    train, held_out = (ConcatenatedRows(corpus.split(name), seq_len, old) for name in ("train", "held_out"))
    return train, held_out


def own_splits(config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> Splits:
    """The rows of a source of one's own, which is called as `source(tokenizer, seq_len, **data.args)`.

    Raises:
        ConfigError: if it fails, or returns something else.
    """
    source = plugin.factory(config.source, "data.source", {})
    made = plugin.call(source, config.source, "data.args", tokenizer, seq_len, **config.args)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ConfigError("data.source", f"{config.source} must return two data sets: (train, held out)")
    for split in made:
        if lacks := [name for name in ("__len__", "__getitem__", "fingerprint") if not hasattr(split, name)]:
            raise ConfigError("data.source", f"{config.source}: a {type(split).__name__} has no {lacks[0]}")
    train, held_out = made
    return train, held_out


def check_sizes(splits: Splits, config: DataConfig, corpus: Corpus | None, seq_len: int, batch: int) -> None:
    """Raise ConfigError if there is too little for one global batch of each.

    Args:
        splits: rows to train on and held out.
        config: that they are of.
        corpus: that they are from, if it is a prepared one.
        seq_len, batch: tokens per row and rows per global batch.
    """
    for side, name, split in (("train on", "train", splits[0]), ("hold out", "held_out", splits[1])):
        if len(split) < batch:
            found = f"{len(split)} rows" if corpus is None else f"{corpus.manifest.count(name, 'documents')} documents"
            hint = "give more text or smaller sizes"
            if corpus is not None and name == "held_out":
                hint = "give more text or smaller sizes, or hold more out (data.held_out)"
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
    from areal_ray.data.corpus import prepare

    splits: Splits
    if plugin.is_plugin(config.source):
        corpus, splits = None, own_splits(config, tokenizer, seq_len)
    else:
        temporary: Any = None
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="areal_ray-data-")
            folder = LocalStorage(temporary.name)
        plan = prepare.make_plan(config, tokenizer, folder)
        prepare.prepare(plan, prepare.in_process, print)
        corpus = Corpus(plan.work.storage)
        splits = open_splits(corpus, seq_len)
        for split in splits:
            split.kept = temporary  # type: ignore[attr-defined]
    check_sizes(splits, config, corpus, seq_len, global_batch_size)
    return splits

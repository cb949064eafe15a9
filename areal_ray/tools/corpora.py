"""Prepared corpora seen from outside: which there are, what is in them, whether they are whole, how they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from areal_ray.data import build_tokenizer
from areal_ray.data.corpus.corpus import Corpus
from areal_ray.data.corpus.manifest import SPLITS, Manifest
from areal_ray.data.corpus.shard import is_intact
from areal_ray.run import RunDir
from areal_ray.run.directory import DATA
from areal_ray.storage import Storage, storage_at


def corpora_at(path: str) -> dict[str, Corpus]:
    """The corpora at a path, by name: itself, those of a run that trains on them, or those in a folder.

    Raises:
        ValueError: if there is none.
    """
    place = storage_at(path)
    names = place.names()
    if "manifest.json" in names:
        return {place.location.rsplit("/", 1)[-1]: Corpus(place)}
    if DATA in names:
        noted = RunDir(place).data() or {}
        places = {name or each["path"].rsplit("/", 1)[-1]: storage_at(each["path"]) for name, each in noted.items()}
        none = "the run trains on no prepared corpus, or it is gone"
    else:
        places = {name: place.sub(name) for name in place.directories("")}
        none = "no prepared corpus, and no run that trains on one"
    found = {}
    for name, each in places.items():
        with suppress(FileNotFoundError):  # of tokens that others have prepared, or one that is not finished
            found[name] = Corpus(each)
    if not found:
        raise ValueError(f"{place.location}: {none}")
    return found


def listing(path: str) -> list[dict[str, Any]]:
    """Name, source, documents, tokens, bytes and place of each corpus at a path."""
    rows = []
    for name, corpus in corpora_at(path).items():
        manifest = corpus.manifest
        counts = {what: sum(manifest.count(split, what) for split in SPLITS) for what in ("documents", "tokens")}
        size = sum(about["bytes"] for about in manifest.files.values())
        rows.append(
            {"name": name, "source": manifest.settings["source"], **counts, "bytes": size, "path": corpus.location}
        )
    return rows


def inspection(manifest: Manifest) -> dict[str, Any]:
    """What a corpus holds and was made of."""
    counts = ("documents", "tokens", "predicted")
    return {
        "fingerprint": manifest.fingerprint,
        "settings": manifest.settings,
        "renderer": manifest.renderer,
        "token type": manifest.dtype,
        "largest id": manifest.largest_id,
        "sources": manifest.sources,
        **{
            split: {"shards": len(manifest.splits[split]), **{what: manifest.count(split, what) for what in counts}}
            for split in SPLITS
        },
        "versions": manifest.versions,
    }


def damaged(storage: Storage, manifest: Manifest) -> list[str]:
    """Names of the files that are not as the manifest says; reads every byte."""
    found = []
    for name, about in manifest.files.items():
        try:
            if not is_intact(storage, name, about):
                found.append(name)
        except FileNotFoundError:
            found.append(name)
    return found


@dataclass(frozen=True)
class Sample:
    """Args:
    document, documents: its number, and how many there are.
    tokens: of the whole document.
    runs: text of neighbouring tokens, and whether these are predicted.
    cut: whether tokens follow that are not shown.
    """

    document: int
    documents: int
    tokens: int
    runs: list[tuple[str, bool]]
    cut: bool


def samples(corpus: Corpus, split: str, count: int, seed: int, longest: int) -> Iterator[Sample]:
    """Some documents, drawn at random, as the tokenizer decodes them.

    Args:
        corpus, split: of what.
        count: documents.
        seed: of the draw.
        longest: tokens of each that are shown.
    """
    stream, tokenizer = corpus.split(split), build_tokenizer(corpus.manifest.settings["tokenizer"])
    decoder = tokenizer.transformers()
    lengths = stream.document_lengths()
    ends = np.cumsum(lengths)
    for number in sorted(np.random.default_rng(seed).permutation(len(lengths))[:count].tolist()):
        shown = min(longest, int(lengths[number]))
        begin = np.asarray([ends[number] - lengths[number]])
        ids = stream.read(begin, shown)[0].tolist()
        predicted = stream.predicted(begin, shown)[0].tolist() if stream.masked else [True] * shown
        runs = [
            (decoder.decode([token for token, _ in run]), said)
            for said, run in groupby(zip(ids, predicted, strict=True), key=lambda pair: pair[1])
        ]
        yield Sample(number, len(lengths), int(lengths[number]), runs, shown < int(lengths[number]))

"""The manifest of a prepared corpus: what it holds and what it was made of. A corpus exists when its manifest does."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from areal_ray import __version__
from areal_ray.storage import Storage

MANIFEST, SOURCES = "manifest.json", "sources.jsonl"
SPLITS = ("train", "held_out")
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One token file.

    Args:
        stem: names its files, see `token_file`.
        tokens, documents: in it.
        predicted: tokens that are predicted.
        largest_id: of a token.
        files: size and digest of each file, by name.
    """

    stem: str
    tokens: int
    documents: int
    predicted: int
    largest_id: int
    files: dict[str, dict[str, Any]]

    @property
    def masked(self) -> bool:
        """Whether it says of each token whether it is predicted; else all of them are."""
        return f"{self.stem}.predicted.bin" in self.files


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds. Grows with the number of shards, of which there is one for 64 MiB of sources.

    Args:
        settings: of config.data, as far as the tokens depend on them.
        renderer: fingerprint of what made tokens of documents, the tokenizer with it.
        dtype: of a token.
        sources: parts, bytes, documents, digest of the listing (names, sizes, times), counts of what was left out.
        splits: shards of each, in order.
        versions: of the libraries that made it.
    """

    settings: dict[str, Any]
    renderer: str
    dtype: str
    sources: dict[str, Any]
    splits: dict[str, list[Shard]]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their bounds, wherever they lie and whenever they were made."""
        files = {
            split: [sorted(each["digest"] for each in shard.files.values()) for shard in shards]
            for split, shards in self.splits.items()
        }
        return digest([FORMAT, self.dtype, self.renderer, files])

    def count(self, split: str, what: str) -> int:
        """The sum of tokens, documents or predicted over the shards of a split."""
        return sum(getattr(shard, what) for shard in self.splits[split])

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 if there is none."""
        return max((shard.largest_id for shards in self.splits.values() for shard in shards), default=-1)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and digest of every file, by name."""
        return {
            name: about for shards in self.splits.values() for shard in shards for name, about in shard.files.items()
        }

    def write(self, storage: Storage) -> None:
        """Commit: with this file the corpus exists."""
        data = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        with storage.create_whole(MANIFEST) as sink:
            sink.write(json.dumps(data, indent=1).encode())

    @staticmethod
    def read(storage: Storage) -> Manifest:
        """Read it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is none of a corpus, or of a later format.
        """
        try:
            data = json.loads(storage.read(MANIFEST))
            if data["format"] != FORMAT:
                raise ValueError(f"{storage.location} is of format {data['format']}; this version reads {FORMAT}")
            splits = {name: [Shard(**shard) for shard in data["splits"][name]] for name in SPLITS}
            names = ("settings", "renderer", "dtype", "sources", "versions")
            found = Manifest(splits=splits, **{name: data[name] for name in names})
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            text = f"{storage.location}/{MANIFEST} is not the manifest of a prepared corpus ({type(error).__name__})"
            raise ValueError(text) from None
        if found.fingerprint != data["fingerprint"]:
            raise ValueError(
                f"{storage.location}/{MANIFEST} does not have the fingerprint that it says: it was changed"
            )
        return found


def library_versions() -> dict[str, str]:
    """Versions of what makes tokens."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"areal_ray": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("tokenizers", "transformers", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digest(value: Sequence[Any] | Mapping[str, Any]) -> str:
    """A hash of JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())

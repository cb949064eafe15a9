"""Pairs of .bin and .idx that others have prepared, for Megatron-LM, NeMo or MaxText: trained on as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from areal_ray.config import ConfigError
from areal_ray.data.corpus.corpus import TokenFile, TokenStream
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.corpus.token_file import Index
from areal_ray.storage import Storage, storage_at

_SAMPLES, _SAMPLE_BYTES = 64, 4096


class MegatronPairs:
    """A TokenSource of pairs of files, end to end in the order given.

    Nothing is read but heads, ends and samples of the files, so that opening them takes no longer for a larger one.

    Args:
        prefixes: paths without .bin and .idx (which may be typed as well), local or s3://, all of one kind.
        held_out_prefixes: of pairs to evaluate on.
        held_out: without them: the last share of all tokens.
        s3: as for `storage_at`.

    Raises:
        ConfigError: if a file is not there, or not what its pair says.
    """

    old_dtype = "<u4"

    def __init__(
        self,
        prefixes: Sequence[str],
        held_out_prefixes: Sequence[str] = (),
        held_out: float = 0.0,
        s3: Mapping[str, str | None] | None = None,
    ) -> None:
        paths = [_full(prefix) for prefix in (*prefixes, *held_out_prefixes)]
        above = common_folder(paths)
        try:
            self._storage = storage_at(above, s3)
        except ValueError as error:
            raise ConfigError("data.paths", str(error)) from None
        self._stems = [path.removeprefix(above).lstrip("/") for path in paths]
        opened = [_open(self._storage, stem) for stem in self._stems]
        if len({index.dtype for index, _ in opened}) > 1:
            kinds = ", ".join(f"{path}: {index.dtype}" for path, (index, _) in zip(paths, opened, strict=True))
            raise ConfigError("data.paths", f"pairs of different types of tokens cannot be one stream ({kinds})")
        self._dtype, self._count = opened[0][0].dtype, len(prefixes)
        self._files = [file for _, file in opened]
        self._held_out = 0.0 if held_out_prefixes else held_out
        where = [len(prefixes)] if held_out_prefixes else []  # without them as it always was
        self.fingerprint = digest([_sampled(self._storage, stem) for stem in self._stems] + [self._held_out, *where])

    @property
    def location(self) -> str:
        return self._storage.location

    def split(self, name: str) -> TokenStream:
        files, apart = self._files[: self._count], self._files[self._count :]
        if not apart:
            files, apart = cut_off(files, self._held_out)
        chosen = files if name == "train" else apart
        return TokenStream(
            self._storage, chosen, self._dtype, digest([self.fingerprint, name]), lambda: self._lengths(chosen)
        )

    def _lengths(self, files: Sequence[TokenFile]) -> np.ndarray:
        """Tokens of each document of these stretches of files; of one that is cut, what lies in the stretch."""
        found = [np.zeros(0, np.int64)]
        for file in files:
            name = f"{file.name.removesuffix('.bin')}.idx"
            ends = np.cumsum(Index.read(self._storage, name).documents(self._storage, name))
            within = np.clip(ends, file.first, file.first + file.tokens)
            found.append(np.diff(within, prepend=file.first))
        return np.concatenate(found)

    def about(self, name: str) -> str:
        return f"{len(self.split(name)):,} tokens"


def cut_off(files: Sequence[TokenFile], share: float) -> tuple[list[TokenFile], list[TokenFile]]:
    """All but the last share of the tokens of files, and these."""
    kept: list[TokenFile] = []
    apart: list[TokenFile] = []
    left = sum(file.tokens for file in files) - round(share * sum(file.tokens for file in files))
    for file in files:
        count = min(file.tokens, left)
        left -= count
        if count:
            kept.append(TokenFile(file.name, count, file.first, file.mask))
        if count < file.tokens:
            apart.append(TokenFile(file.name, file.tokens - count, file.first + count, file.mask))
    return kept, apart


def common_folder(paths: Sequence[str]) -> str:
    """The folder that all paths lie in, or in a folder of which."""
    if len({path.partition("://")[0] for path in paths if "://" in path}) + any("://" not in p for p in paths) > 1:
        raise ConfigError("data.paths", "must all be local, or all in s3://")
    folders = [os.path.dirname(path) for path in paths]
    if not paths[0].startswith("s3://"):
        return os.path.commonpath(folders)
    return "s3://" + os.path.commonpath([folder.removeprefix("s3://") for folder in folders])


def _full(prefix: str) -> str:
    path = prefix.removesuffix(".bin").removesuffix(".idx")
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def _open(storage: Storage, stem: str) -> tuple[Index, TokenFile]:
    place = f"{storage.location}/{stem}"
    try:
        index, size = Index.read(storage, f"{stem}.idx"), storage.size(f"{stem}.bin")
        if size is None:
            raise ConfigError("data.paths", f"there is no {place}.bin beside its .idx")
        tokens = index.end(storage, f"{stem}.idx")
    except FileNotFoundError:
        raise ConfigError("data.paths", f"there is no {place}.idx") from None
    except ValueError as error:
        raise ConfigError("data.paths", str(error)) from None
    if size != tokens * index.dtype.itemsize:
        held = size // index.dtype.itemsize
        raise ConfigError("data.paths", f"{place}.bin has {held:,} tokens, but its .idx speaks of {tokens:,}")
    mask = f"{stem}.predicted.bin" if storage.size(f"{stem}.predicted.bin") is not None else None
    return index, TokenFile(f"{stem}.bin", tokens, mask=mask)


def _sampled(storage: Storage, stem: str) -> list[Any]:
    """Sizes of a pair and a hash of some of its bytes: it tells other data, if not a single changed token."""
    found: list[Any] = []
    for name in (f"{stem}.idx", f"{stem}.bin"):
        size, read = storage.size(name) or 0, xxhash.xxh3_128()
        last = max(0, size - _SAMPLE_BYTES)
        for offset in sorted({int(at) for at in np.linspace(0, last, _SAMPLES)}):
            read.update(storage.read_range(name, offset, _SAMPLE_BYTES))
        found += [size, read.hexdigest()]
    return found

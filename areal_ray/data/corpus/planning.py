"""What is to be prepared: the corpus of a configuration, its name, and the groups of its sources."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from areal_ray.config import DataConfig, redact
from areal_ray.data.build import build_renderer, build_source
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.corpus.shard import Group, Work, part_bytes
from areal_ray.data.corpus.token_file import token_dtype
from areal_ray.data.records import Part
from areal_ray.data.tokenizers import Tokenizer
from areal_ray.storage import Storage

GROUP_BYTES = 64 << 20
_NOT_TOKENS = (
    *("prepared_path", "prepare_in_process_mb", "prefetch_batches"),
    *("packing", "document_mask", "truncation", "mixture", "allow_other_tokenizer"),  # of rows, checks
)
_ALWAYS = ("source", "tokenizer", "held_out")


@dataclass(frozen=True)
class Plan:
    """A corpus that is to be there.

    Args:
        work: how to prepare it, and where.
        groups: of its sources.
        settings: of config.data that its tokens depend on.
        listing: digest of names, sizes and times of the sources.
    """

    work: Work
    groups: tuple[Group, ...]
    settings: dict[str, object]
    listing: str

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)


def settings_of(config: DataConfig) -> dict[str, object]:
    """The part of config.data that the tokens of a corpus depend on, as far as it is not the default.

    So a later version with more keys finds what this one has prepared. Secrets of data.args are not in it: it is
    written into manifests.
    """
    default, config = asdict(DataConfig()), replace(config, tokenizer=config.tokenizer or "bytes")
    return {
        name: value
        for name, value in redact(asdict(config)).items()
        if name in _ALWAYS or (name not in _NOT_TOKENS and value != default[name])
    }


def make_plan(
    config: DataConfig, tokenizer: Tokenizer, folder: Storage, s3: Mapping[str, str | None] | None = None
) -> Plan:
    """What is to be prepared for a configuration; looks at the sources' names, sizes and times, not into them.

    Args:
        config: of the data.
        tokenizer: of config.tokenizer.
        folder: where corpora lie, each under a name that follows from its settings and sources.
        s3: of sources in s3://, as for `storage_at`.

    Raises:
        ConfigError: if there is nothing to read.
    """
    source, renderer = build_source(config, s3), build_renderer(config, tokenizer)
    settings, parts = settings_of(config), source.parts()
    listing = listing_of(parts)
    key = digest([{**settings, "paths": None, "held_out_paths": None}, renderer.fingerprint, listing])[:16]
    work = Work(folder.sub(key), source, renderer, config.held_out, token_dtype(tokenizer.vocab_size - 1).str)
    return Plan(work, tuple(groups_of(parts)), settings, listing)


def groups_of(parts: Sequence[Part]) -> list[Group]:
    """Parts in groups of GROUP_BYTES, or a little more, each of a single split if parts say theirs."""
    found: list[Group] = []
    waiting: list[Part] = []
    size = 0
    for part in parts:
        if waiting and (part.split != waiting[0].split or size >= GROUP_BYTES):
            found.append(Group(len(found), tuple(waiting), waiting[0].split))
            waiting, size = [], 0
        waiting.append(part)
        size += part_bytes(part)
    if waiting:
        found.append(Group(len(found), tuple(waiting), waiting[0].split))
    return found


def listing_of(parts: Sequence[Part]) -> str:
    """A digest of names, sizes and times of change, with which it is noticed that sources are not what they were.

    Times are those of files; of an object of S3 its size must do.
    """
    paths = dict.fromkeys(part.path for part in parts)
    files = [os.path.dirname(path) for path in paths if path.startswith("/")]
    above = os.path.commonpath(files) if files else ""
    times: dict[str, int | None] = dict.fromkeys(paths)
    for path in paths:
        with suppress(OSError):  # not of this file system: its size must do
            times[path] = os.stat(path).st_mtime_ns
    return digest([(*_place(part, above), part.begin, part.end, part.size, times[part.path]) for part in parts])


def _place(part: Part, above: str) -> tuple[str, ...]:
    """The name of a part's file below a folder (a URI, or the name of a data set, is one as it is), and its split."""
    name = os.path.relpath(part.path, above) if part.path.startswith("/") else part.path
    return (name,) if part.split is None else (name, part.split)

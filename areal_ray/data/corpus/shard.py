"""Preparing one shard: the documents of a few parts to the token files of both splits.

A pure function of the parts' content and the renderer: whoever does it, and however often, the bytes are the same.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from areal_ray.data.corpus.manifest import SPLITS, Shard
from areal_ray.data.corpus.token_file import Index, TokenWriter
from areal_ray.data.records import Document, Part, Renderer, Source, Tokens
from areal_ray.storage import Storage

_PIECE = 1 << 22  # tokens that are copied at a time
Advance = Callable[[int, int], None]  # told of bytes read and tokens made


@dataclass(frozen=True)
class Group:
    """Parts that go to one shard of each split.

    Args:
        number: in the order of the corpus.
        parts: in their order.
        split: where all of them go; None: each document by its content.
    """

    number: int
    parts: tuple[Part, ...]
    split: str | None = None

    @property
    def bytes(self) -> int:
        return sum(part_bytes(part) for part in self.parts)


def part_bytes(part: Part) -> int:
    return (part.size if part.end is None else part.end) - part.begin if part.bytes is None else part.bytes


@dataclass(frozen=True)
class Work:
    """How groups are prepared; can be pickled.

    Args:
        storage: of the corpus.
        source: of the documents, by part.
        renderer: makes tokens of them.
        held_out: share of the documents that is held out, by the hash of their content.
        dtype: of a token.
    """

    storage: Storage
    source: Source
    renderer: Renderer
    held_out: float
    dtype: str

    @property
    def skipped(self) -> Counter[str]:
        """What this process has left out so far, by reason."""
        return self.source.skipped + self.renderer.skipped


@dataclass(frozen=True)
class Record:
    """What came of a group.

    Args:
        shards: by split, where there is one.
        parts: path, first byte, bytes, documents and digest of each part.
        least: hash and number of the document, of those to train on, that would be the next one to hold out; None
            without documents.
        skipped: what was left out, by reason.
    """

    shards: dict[str, Shard]
    parts: list[tuple[str, int, int, int, str]]
    least: tuple[int, int] | None
    skipped: dict[str, int]

    @staticmethod
    def load(data: bytes) -> Record:
        value = json.loads(data)
        shards = {name: Shard(**shard) for name, shard in value["shards"].items()}
        least = None if value["least"] is None else tuple(value["least"])
        return Record(shards, [tuple(part) for part in value["parts"]], least, value["skipped"])

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def prepare_group(work: Work, group: Group, keep: bool, advance: Advance = lambda _bytes, _tokens: None) -> Record:
    """Prepare a group, or find that it is prepared already.

    Memory: that of one document, and a few megabytes.

    Args:
        work: how.
        group: what.
        keep: write the record down, so that a later try finds it.
        advance: told of progress.
    """
    name = f"{group.number:05}.done"
    if keep and (found := _finished(work.storage, name)) is not None:
        advance(group.bytes, sum(shard.tokens for shard in found.shards.values()))
        return found
    parts: list[tuple[str, int, int, int, str]] = []
    least: tuple[int, int] | None = None
    before = work.skipped
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(work.storage, f"{group.number:05}.{split}", np.dtype(work.dtype)))
            for split in SPLITS
        }
        for part in group.parts:
            documents, read = 0, xxhash.xxh3_128()
            for document in work.source.read(part):
                content = _content(document)
                documents += 1
                read.update(content)
                crc = zlib.crc32(content)
                split = group.split or ("held_out" if crc / 2**32 < work.held_out else "train")
                writer = writers[split]
                made = writer.tokens
                for number, tokens in enumerate(work.renderer(document)):
                    if not number:  # of which nothing is left is none
                        writer.begin_document()
                    writer.add(tokens)
                if split == "train" and writer.tokens > made:
                    this = crc, writer.documents - 1
                    least = min(least or this, this)
                advance(len(content), writer.tokens - made)
            parts.append((part.path, part.begin, part_bytes(part), documents, read.hexdigest()))
    record = Record(_shards(writers), parts, least, dict(work.skipped - before))
    if keep:
        with work.storage.create_whole(name) as sink:
            sink.write(record.dump())
    return record


def _content(document: Document) -> bytes:
    """Of which the hash decides about the split: for a record, its JSON."""
    content = document.content
    if isinstance(content, bytes):
        return content
    return json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")


def _shards(writers: dict[str, TokenWriter]) -> dict[str, Shard]:
    return {
        split: Shard(
            stem=writer.stem,
            tokens=writer.tokens,
            documents=writer.documents,
            predicted=writer.predicted,
            largest_id=writer.largest_id,
            files=files,
        )
        for split, writer in writers.items()
        if (files := writer.files())
    }


def _finished(storage: Storage, name: str) -> Record | None:
    """The record of a group that an earlier try finished; None if there is none, or its files are not as it says."""
    try:
        record = Record.load(storage.read(name))
    except FileNotFoundError:
        return None
    files = [item for shard in record.shards.values() for item in shard.files.items()]
    return record if all(is_intact(storage, name, about) for name, about in files) else None


def is_intact(storage: Storage, name: str, about: dict[str, Any]) -> bool:
    """Whether a file has the size and the digest that were written down; reads all of it."""
    if storage.size(name) != about["bytes"]:
        return False
    read = xxhash.xxh3_128()
    for block in storage.read_blocks(name, about["bytes"]):
        read.update(block)
    return read.hexdigest() == about["digest"]


def hold_back(work: Work, group: Group, shard: Shard, document: int, share: float | None) -> dict[str, Shard]:
    """Hold out one document of a shard to train on, for which other token files are written.

    The old ones stay until the corpus is committed: another job may read them for the same purpose.

    Args:
        work, group, shard: with the document.
        document: its number in the shard.
        share: of its tokens, the last ones, that is held out; None: all.
    """
    storage, name = work.storage, f"{shard.stem}.idx"
    index = Index.read(storage, name)
    ends = np.cumsum(index.lengths(storage, name), dtype=np.int64).tolist()
    bounds = index.document_bounds(storage, name).tolist()
    chosen = range(bounds[document], bounds[document + 1])  # sequences
    begin, end = ([0, *ends][chosen.start], [0, *ends][chosen.stop])
    cut = begin if share is None else end - round((end - begin) * share)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(storage, f"{group.number:05}h.{split}", np.dtype(work.dtype)))
            for split in SPLITS
        }
        for first, last in pairwise(bounds):
            begun = set[str]()
            for low, high in pairwise([0, *ends][first : last + 1]):
                middle = high if first != chosen.start else min(max(low, cut), high)
                for split, span in (("train", (low, middle)), ("held_out", (middle, high))):
                    if split not in begun and span[0] < span[1]:
                        writers[split].begin_document()
                        begun.add(split)
                    for tokens in _pieces(storage, shard, np.dtype(work.dtype), *span):
                        writers[split].add(tokens)
    return _shards(writers)


def _pieces(storage: Storage, shard: Shard, dtype: np.dtype[Any], begin: int, end: int) -> Iterator[Tokens]:
    for at in range(begin, end, _PIECE):
        count = min(_PIECE, end - at)
        ids = storage.read_range(f"{shard.stem}.bin", at * dtype.itemsize, count * dtype.itemsize)
        mask = None
        if shard.masked:
            mask = np.frombuffer(storage.read_range(f"{shard.stem}.predicted.bin", at, count), bool)
        yield Tokens(np.frombuffer(ids, dtype).astype(np.uint32), mask)

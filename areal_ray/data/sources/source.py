"""Sources of files: what they have in common, and that of whole files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath

from areal_ray.config import ConfigError, SourceConfig
from areal_ray.data.records import Document, Part
from areal_ray.data.sources.files import (
    DAMAGED,
    Options,
    compression,
    find,
    identity,
    left_out_note,
    open_file,
    open_plain,
)
from areal_ray.data.sources.text import LEFT_OUT, REST_LEFT_OUT, Text

PART_BYTES = 64 << 20
_RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv"}


def with_held_out(parts: list[Part], held_out: list[Part]) -> list[Part]:
    """Parts to train on and those that are held out, which may be among the former; as they are, if none are."""
    if not held_out:
        return parts
    named = {identity(part.path) for part in held_out}
    train = [replace(part, split="train") for part in parts if identity(part.path) not in named]
    return train + [replace(part, split="held_out") for part in held_out]


class FileSource:
    """A Source of files, whose kind says how one is read.

    Args:
        config: of the source.
        s3: of s3:// paths.
    """

    endings: tuple[str, ...] = ()  # of files that are taken from a directory; none: all
    can_be_cut = False  # whether a part may begin in the middle of a file

    def __init__(self, config: SourceConfig, s3: Options | None = None) -> None:
        self.config, self.s3 = config, s3
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self._text = Text(config, self.skipped)

    def parts(self) -> list[Part]:
        return with_held_out(self._parts(self.config.paths), self._parts(self.config.held_out_paths))

    def read(self, part: Part) -> Iterator[Document]:
        counts_as = LEFT_OUT
        try:
            for document in self._read(part):
                counts_as = REST_LEFT_OUT
                yield document
        except DAMAGED as error:
            self._text.refuse(part.path, f"cannot be read, it is damaged or cut off: {error}", counts_as)
        except OSError as error:
            # Never left out: a disk or a network that fails now would make another corpus of the same files.
            if "://" in part.path:
                raise
            if error.errno is not None:
                raise ConfigError("data.paths", f"cannot read {part.path}: {error.strerror}") from None
            # Of pyarrow's zstd.
            self._text.refuse(part.path, f"cannot be read, it is damaged or cut off: {error}", counts_as)

    def _read(self, part: Part) -> Iterator[Document]:
        raise NotImplementedError

    def _parts(self, patterns: Sequence[str]) -> list[Part]:
        if not patterns:
            return []
        files = find(patterns, self.endings, self.s3)
        self.notes += left_out_note(files)
        parts: list[Part] = []
        for file in files.found:
            if self.can_be_cut and file.size > PART_BYTES and self._is_plain(file.path):
                begins = range(0, file.size, PART_BYTES)
                parts += [Part(file.path, at, min(at + PART_BYTES, file.size), file.size) for at in begins]
            else:
                parts.append(Part(file.path, size=file.size))
        return parts

    def _is_plain(self, path: str) -> bool:
        with open_plain(path, self.s3) as file:
            return compression(file) is None


class TextFiles(FileSource):
    """A Source of text files, one document each, of which a whole one is in memory."""

    def parts(self) -> list[Part]:
        parts = super().parts()
        kinds = {_RECORDS.get(PurePath(part.path).suffix.lower()) for part in parts}
        if len(kinds) == 1 and (kind := kinds.pop()):
            self.notes.append(
                f"data: {parts[0].path} looks like {kind}, and as source `text` is one document as it stands: "
                f"data.source={kind} reads its records"
            )
        return parts

    def _read(self, part: Part) -> Iterator[Document]:
        with open_file(part.path, self.s3) as file:
            content = self._text.clean(file.read(), part.path)
        if content is not None:
            self.skipped["empty"] += not content
            yield Document(content, part.path)

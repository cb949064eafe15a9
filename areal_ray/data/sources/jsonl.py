"""JSON lines: one record a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from areal_ray.config import SourceConfig
from areal_ray.data.records import Document, Part
from areal_ray.data.sources.files import Options, open_file, open_plain
from areal_ray.data.sources.records import Records
from areal_ray.data.sources.source import FileSource


class JsonLines(FileSource):
    """A Source of files of JSON lines. A part has the lines that begin in it; a line is in memory whole."""

    endings = (".jsonl", ".ndjson", ".json")
    can_be_cut = True

    def __init__(self, config: SourceConfig, s3: Options | None = None) -> None:
        super().__init__(config, s3)
        self._records = Records(config, self._text)

    def _read(self, part: Part) -> Iterator[Document]:
        # Not how many lines stand before it: to know that every part would read all parts before it.
        counted = f" (counted from byte {part.begin:,} on)" if part.begin else ""
        with open_file(part.path, self.s3) if part.end is None else open_plain(part.path, self.s3) as file:
            at = part.begin
            if at:  # a line that begins before belongs to the part before
                file.seek(at - 1)
                at += len(file.readline()) - 1
            for number, line in enumerate(iter(file.readline, b""), 1):
                if part.end is not None and at >= part.end:
                    break
                at += len(line)
                content = self._text.clean(line, part.path, f"{number}{counted}")
                if content is None or not content.strip():  # an empty line is no record
                    continue
                if (document := self._document(content, f"{part.path}:{number}{counted}")) is not None:
                    yield document

    def _document(self, content: bytes, origin: str) -> Document | None:
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            self._text.refuse(origin, f"this is no JSON: {error}")
            return None
        return self._records.document(record, origin)

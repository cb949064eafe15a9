"""Tables: records are rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from areal_ray.config import ConfigError, SourceConfig
from areal_ray.data.records import Document, Part
from areal_ray.data.sources.files import Options, open_file, open_plain
from areal_ray.data.sources.records import Records
from areal_ray.data.sources.source import FileSource
from areal_ray.data.sources.text import LEFT_OUT, REST_LEFT_OUT

_ROWS = 256  # that are read at a time


class Csv(FileSource):
    """A Source of CSV files, whose first line has the names of the fields; those called .tsv are cut at tabs.

    A field is in memory whole. Invalid UTF-8 is replaced, or refused with the row of which it is.
    """

    endings = (".csv", ".tsv")

    def __init__(self, config: SourceConfig, s3: Options | None = None) -> None:
        super().__init__(config, s3)
        self._records = Records(config, self._text)

    def _read(self, part: Part) -> Iterator[Document]:
        csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that csv takes for a mistake
        with open_file(part.path, self.s3) as file:
            delimiter = "\t" if ".tsv" in part.path.lower() else ","
            refused: list[int] = []  # lines of this row
            rows = csv.reader(self._lines(file, part.path, refused), delimiter=delimiter, strict=True)
            names: list[str] | None = None
            while True:
                refused.clear()
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    counts_as = REST_LEFT_OUT if names else LEFT_OUT
                    self._text.refuse(f"{part.path}:{rows.line_num}", f"this is no CSV: {error}", counts_as)
                    return
                if row is None or (refused and names is None):
                    return
                if refused:
                    continue
                if names is None:
                    names = row
                elif row:
                    origin = f"{part.path}:{rows.line_num}"
                    if len(row) != len(names):
                        self._text.refuse(origin, f"{len(row)} fields, where the first line names {len(names)}")
                    elif document := self._records.document(dict(zip(names, row, strict=True)), origin):
                        yield document

    def _lines(self, file: Any, path: str, refused: list[int]) -> Iterator[str]:
        for number, line in enumerate(iter(file.readline, b""), 1):
            content = self._text.clean(line, path, str(number))
            if content is None:  # it is read all the same, or the row would seem to go on in the next line
                refused.append(number)
                content = line
            yield content.decode(errors="replace")


class Parquet(FileSource):
    """A Source of Parquet files, and of Arrow files as `datasets` saves them (save_to_disk).

    A part has the row groups that begin in it, and one of them is in memory, or one record batch.
    """

    endings = (".parquet", ".arrow")
    can_be_cut = True

    def __init__(self, config: SourceConfig, s3: Options | None = None) -> None:
        super().__init__(config, s3)
        self._records = Records(config, self._text, table=True)
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError("data.source", "`parquet` needs pyarrow: areal_ray[s3]") from None

    def _read(self, part: Part) -> Iterator[Document]:
        import pyarrow

        counts_as = LEFT_OUT
        try:
            with open_plain(part.path, self.s3) as file:
                is_parquet = file.read(4) == b"PAR1"
                file.seek(0)
                for number, row in self._parquet(file, part) if is_parquet else self._arrow(file, part):
                    if document := self._records.document(row, f"{part.path}:{number}"):
                        counts_as = REST_LEFT_OUT
                        yield document
        except pyarrow.ArrowException as error:
            why = f"this is neither Parquet nor Arrow: {' '.join(str(error).split())[:200]}"
            self._text.refuse(part.path, why, counts_as)

    def _parquet(self, file: io.BufferedReader, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            number, groups = 0, table.metadata.num_row_groups
            for group in range(groups):
                about = table.metadata.row_group(group)
                begins = min((_begin(about.column(i)) for i in range(about.num_columns)), default=0)
                if part.end is not None and not part.begin <= begins < part.end:
                    number += about.num_rows
                    continue
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=self._wanted(table.schema_arrow)):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row

    def _arrow(self, file: io.BufferedReader, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow.ipc

        if part.begin:  # not cut: the first part reads all of it
            return
        number, is_file = 0, file.peek(6)[:6] == b"ARROW1"
        if is_file:
            opened = pyarrow.ipc.open_file(file)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(begin, _ROWS).to_pylist():
                    number += 1
                    yield number, row

    def _wanted(self, schema: Any) -> list[str]:
        """Columns that are read: those of the format, so that others cost nothing; all, if there are none of them."""
        wanted = {*self._records.fields.values(), "input_ids"}
        return [name for name in schema.names if name in wanted] or list(schema.names)


def _begin(column: Any) -> int:
    """The first byte of a column's chunk."""
    dictionary = column.dictionary_page_offset
    return int(dictionary) if column.has_dictionary_page and dictionary else int(column.data_page_offset)

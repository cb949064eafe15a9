"""Records to documents: the text of a field, or all that a format needs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal_ray.config import SourceConfig
from areal_ray.config.data_rules import FIELDS
from areal_ray.data.records import Document
from areal_ray.data.sources.text import Text

_OPTIONAL = {"tools"}


class Records:
    """Makes documents of records, each with the fields of data.format under their own names.

    Args:
        config: the format, and which of a record's fields are meant.
        text: of the source.
        table: whether records are rows, so that each has every field, and None in those that it does not have.
    """

    def __init__(self, config: SourceConfig, text: Text, table: bool = False) -> None:
        self._table = table
        self._is_text, self._text = config.format == "text", text
        self.fields = {name: config.fields.get(name, name) for name in FIELDS[config.format]}

    def document(self, record: Any, origin: str) -> Document | None:
        """The document of a record; None if it is left out.

        Args:
            record: a mapping, if it is as it should be. Without a text it may have `input_ids`, tokens already.
            origin: "path:line".

        Raises:
            ConfigError: if it lacks a field, and data.on_error is fail.
        """
        if not isinstance(record, Mapping):
            return self._refused(origin, f"a record has fields, and this is a {type(record).__name__}")
        if self._is_text and self.fields["text"] not in record and "input_ids" in record:
            return Document({"input_ids": record["input_ids"]}, origin)
        found = {}
        for name, field in self.fields.items():
            value = _without_nothing(record.get(field)) if self._table else record.get(field)
            if value is not None:
                found[name] = value
            elif name not in _OPTIONAL:
                there = ", ".join(map(str, record)) or "none"
                hint = f"data.fields={{{name}: ...}} names another"
                return self._refused(origin, f"a record without field {field!r}, which has {there}; {hint}")
        if not self._is_text:
            return Document(found, origin)
        if not isinstance(found["text"], str):
            return self._refused(origin, f"field {self.fields['text']!r} is no text: {type(found['text']).__name__}")
        content = self._text.encode(found["text"], origin)
        if content == b"":
            self._text.skipped["empty left out"] += 1
        return Document(content, origin) if content else None

    def _refused(self, origin: str, why: str) -> Document | None:
        self._text.refuse(origin, why)
        return None


def _without_nothing(value: Any) -> Any:
    """The value without fields that are None."""
    if isinstance(value, Mapping):
        return {name: _without_nothing(below) for name, below in value.items() if below is not None}
    return [_without_nothing(below) for below in value] if isinstance(value, list) else value

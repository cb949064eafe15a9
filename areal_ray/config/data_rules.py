"""Rules of the data's configuration beyond keys and types."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING

from areal_ray.config.data_schema import DataConfig, MixtureConfig, SourceConfig
from areal_ray.config.errors import ConfigError
from areal_ray.config.plugin import check_form, is_plugin

if TYPE_CHECKING:
    from areal_ray.config import Config

SOURCES = ("stdlib", "text", "jsonl", "parquet", "csv", "hub", "megatron", "datasets")
FIELDS = {
    "text": ("text",),
    "messages": ("messages", "tools"),
    "completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}


def check_data(config: Config) -> None:
    """Raise ConfigError for the first rule that the data's part of the config breaks."""
    data = config.data
    check_source(data, "data")
    names = set[str]()
    for i, each in enumerate(data.mixture):
        key = f"data.mixture[{i}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", each.name):
            raise ConfigError(f"{key}.name", f"{each.name!r} must be letters, digits, '_' or '-', for its metrics")
        if each.name in names:
            raise ConfigError(f"{key}.name", f"there is another source {each.name!r}")
        if not each.weight > 0:
            raise ConfigError(f"{key}.weight", f"must be greater than 0, not {each.weight}")
        if is_plugin(each.source):
            raise ConfigError(f"{key}.source", "one's own sources cannot be mixed; make one that mixes them itself")
        names.add(each.name)
        check_source(each, key)
    if data.mixture:
        for name in (field.name for field in fields(SourceConfig)):
            if getattr(data, name) != getattr(DataConfig(), name):
                raise ConfigError(f"data.{name}", "stands beside data.mixture; put it into its entries")
    if data.prefetch_batches < 0:
        raise ConfigError("data.prefetch_batches", f"must be 0 or more, not {data.prefetch_batches}")
    if config.run.name == "data" and data.prepared_path is None:
        raise ConfigError("run.name", "data is where prepared corpora lie; choose another, or set data.prepared_path")
    _check_rows(data)


def check_source(data: SourceConfig, key: str) -> None:
    """Raise ConfigError for the first rule that one source breaks; `key` is where it stands."""
    source = data.source
    if is_plugin(source):
        check_form(source, f"{key}.source")
    elif source not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(f"{key}.source", f"knows {known}, or package.module:name for your own; not {source!r}")
    elif data.args and source != "hub":
        raise ConfigError(f"{key}.args", f"are for your own package.module:name; {source!r} takes none")
    if source == "stdlib" or is_plugin(source):
        for name in ("paths", "held_out_paths"):
            if getattr(data, name):
                raise ConfigError(f"{key}.{name}", f"are for sources of files; the source is {source!r}")
    elif not data.paths:
        what = "names of data sets" if source == "hub" else "files, directories or globs"
        raise ConfigError(f"{key}.paths", f"source `{source}` needs {what}")
    formats = {
        "text": ("text",),
        "megatron": ("text",),
        "datasets": ("text",),
        "stdlib": ("text", "messages", "completion"),
    }
    if not is_plugin(source) and data.format not in formats.get(source, FIELDS):
        raise ConfigError(f"{key}.format", f"source `{source}` has no records of format `{data.format}`")
    known_fields = FIELDS[data.format]
    if other := [name for name in data.fields if name not in known_fields]:
        text = f"of format `{data.format}` are {', '.join(known_fields)}; not {other[0]!r}"
        raise ConfigError(f"{key}.fields", text)
    if not 0 <= data.held_out < 1:
        raise ConfigError(f"{key}.held_out", f"must be between 0 and 1, or 0 for none, not {data.held_out}")


def _check_rows(data: DataConfig) -> None:
    parts: list[MixtureConfig | DataConfig] = [*data.mixture] or [data]
    formats = {part.format for part in parts}
    if "preference" in formats and len(formats) > 1:
        raise ConfigError("data.format", "preference records cannot be mixed with other data")
    if "preference" in formats and (data.packing != "none" or data.document_mask):
        raise ConfigError("data.packing", "preference records come one a row: data.packing=none, without document_mask")
    if any(part.source == "datasets" for part in parts) and (data.packing != "concatenate" or data.document_mask):
        text = "tokens of source `datasets` are concatenated, without document_mask; others need files of documents"
        raise ConfigError("data.packing", text)
    if data.packing == "concatenate" and data.truncation is not None:
        raise ConfigError("data.truncation", "is for packing best_fit or none; concatenate cuts nothing off")
    if data.truncation == "split" and formats - {"text"}:
        raise ConfigError("data.truncation", "a record cannot be split: error, left, right or drop")

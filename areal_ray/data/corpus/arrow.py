"""Directories that `datasets` has saved (`save_to_disk`), of tokens: trained on as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from areal_ray.config import ConfigError
from areal_ray.data.corpus.corpus import TokenFile, TokenStream
from areal_ray.data.corpus.manifest import digest
from areal_ray.data.corpus.megatron import common_folder, cut_off
from areal_ray.storage import LocalStorage

_COLUMN = "input_ids"


class ArrowTokens:
    """A TokenSource of the column input_ids of Arrow files on a disk, row after row.

    The ids of a record batch lie end to end in its file: where, is found out once, by mapping the file and looking at
    the heads of its batches, and from then on they are read by position. Grows with the number of batches.

    Args:
        folders: as `Dataset.save_to_disk` wrote them.
        held_out_folders: to evaluate on.
        held_out: without them: the last share of all tokens.

    Raises:
        ConfigError: if they hold no such column, or one that cannot be read in place.
    """

    old_dtype = "<u4"

    def __init__(self, folders: Sequence[str], held_out_folders: Sequence[str] = (), held_out: float = 0.0) -> None:
        paths = [os.path.realpath(os.path.expanduser(path)) for path in (*folders, *held_out_folders)]
        above = common_folder([f"{path}/any" for path in paths])
        self._storage = LocalStorage(above)
        found = [_look(Path(path), above) for path in paths]
        if len(types := {dtype for _, dtype, _, _ in found}) > 1:
            text = f"input_ids of different types cannot be one stream ({', '.join(map(str, types))})"
            raise ConfigError("data.paths", text)
        self._dtype = found[0][1]
        held = found[len(folders) :]
        self._files = [file for files, *_ in found[: len(folders)] for file in files]
        self._apart = [file for files, *_ in held for file in files]
        self._rows = sum(rows for *_, rows, _ in found[: len(folders)]), sum(rows for *_, rows, _ in held)
        if not held:
            self._files, self._apart = cut_off(self._files, held_out)
        where = [len(folders)] if held else []  # without them as it always was
        self.fingerprint = digest([name for *_, name in found] + [held_out, self._dtype.str, *where])

    @property
    def location(self) -> str:
        return self._storage.location

    def split(self, name: str) -> TokenStream:
        def unknown() -> np.ndarray:
            raise AssertionError("no packing of this source asks for its documents")

        files = self._files if name == "train" else self._apart
        return TokenStream(self._storage, files, self._dtype, digest([self.fingerprint, name]), unknown)

    def about(self, name: str) -> str:
        return f"{len(self.split(name)):,} tokens"


def _look(folder: Path, above: str) -> tuple[list[TokenFile], np.dtype[Any], int, str]:
    """The stretches of tokens in a folder, their type, the number of rows, and the fingerprint that `datasets` gave."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        splits = [path.parent.name for path in sorted(folder.glob("*/state.json"))]
        hint = f"; of its splits ({', '.join(splits)}) name one" if splits else ""
        raise ConfigError("data.paths", f"{folder} is no directory that `datasets` has saved{hint}") from None
    if state.get("_indices_data_files"):
        raise ConfigError("data.paths", f"{folder} is a selection of rows: save it after flatten_indices()")
    files: list[TokenFile] = []
    dtype: np.dtype[Any] | None = None
    rows = 0
    sizes = []
    for each in state["_data_files"]:
        path = folder / each["filename"]
        sizes.append(path.stat().st_size)
        with pa.memory_map(str(path)) as source:
            base = source.read_buffer(1).address
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                column = _column(batch, folder)
                dtype = np.dtype(column.type.value_type.to_pandas_dtype())
                offsets = column.offsets
                first, last = offsets[0].as_py(), offsets[-1].as_py()
                at = column.values.buffers()[1].address - base + (column.values.offset + first) * dtype.itemsize
                if not 0 <= at < sizes[-1] or at % dtype.itemsize:
                    raise ConfigError("data.paths", f"{path} is compressed; save it anew, without")
                rows += len(column)
                if last > first:
                    files.append(TokenFile(os.path.relpath(path, above), last - first, at // dtype.itemsize))
    if dtype is None:
        raise ConfigError("data.paths", f"{folder} has no rows")
    return files, dtype, rows, f"{state.get('_fingerprint')}-{sizes}"


def _column(batch: Any, folder: Path) -> Any:
    names = batch.schema.names
    if _COLUMN not in names:
        text = f"{folder} has no column input_ids of tokens, but {', '.join(names)}"
        raise ConfigError("data.paths", text + "; texts are read from files: data.source=parquet or jsonl")
    if "labels" in names:
        raise ConfigError(
            "data.paths", f"{folder} has labels, which this source does not read: prepare it from records"
        )
    column = batch.column(_COLUMN)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ConfigError("data.paths", f"{folder}: input_ids is of type {column.type}, not a list of integers")
    if not pa.types.is_integer(column.type.value_type) or column.null_count:
        raise ConfigError("data.paths", f"{folder}: input_ids must be lists of integers, none of them missing")
    return column

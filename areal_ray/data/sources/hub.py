"""Data sets by the `datasets` library: of the Hugging Face hub, and whatever else it loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from areal_ray.config import ConfigError, SourceConfig
from areal_ray.data.records import Document, Part
from areal_ray.data.sources.records import Records
from areal_ray.data.sources.source import with_held_out
from areal_ray.data.sources.text import Text

_ROWS = 50_000  # of a part


class Hub:
    """A Source of data sets by name; each machine that reads a part has its own copy of them in `datasets`' cache.

    Args:
        config: of the source; args are those of load_dataset: split (train, if it is not given), name, revision, ...
    """

    def __init__(self, config: SourceConfig) -> None:
        self._config, self.skipped = config, Counter[str]()
        self.notes: list[str] = []
        self._text = Text(config, self.skipped)
        self._records = Records(config, self._text, table=True)

    def parts(self) -> list[Part]:
        return with_held_out(self._parts(self._config.paths), self._parts(self._config.held_out_paths))

    def read(self, part: Part) -> Iterator[Document]:
        table = self._load(part.path.removeprefix("hub:"))
        assert part.end is not None
        for number in range(part.begin, part.end):
            if document := self._records.document(table[number], f"{part.path}:{number + 1}"):
                yield document

    def _parts(self, names: Sequence[str]) -> list[Part]:
        parts: list[Part] = []
        for name in names:
            table = self._load(name)
            rows = len(table)
            each = table.data.nbytes / max(1, rows)
            for at in range(0, rows, _ROWS):
                end = min(at + _ROWS, rows)
                parts.append(Part(f"hub:{name}", at, end, rows, bytes=round(each * (end - at))))
        return parts

    def _load(self, name: str) -> Any:
        try:
            import datasets
        except ModuleNotFoundError:
            text = "`hub` needs the package datasets: areal_ray[datasets]; downloaded files are read without it"
            raise ConfigError("data.source", text) from None
        name, _, split = name.partition("#")  # of data.held_out_paths, as another split of the same: NAME#test
        try:
            if Path(name, "state.json").exists():
                return datasets.load_from_disk(name)
            options = {"split": "train", **self._config.args, **({"split": split} if split else {})}
            return datasets.load_dataset(name, **options)
        except Exception as error:  # the library's own, of the network and of names
            text = " ".join(str(error).split())[:300]
            raise ConfigError("data.paths", f"{name!r} cannot be loaded: {type(error).__name__}: {text}") from error

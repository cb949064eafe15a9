"""Source and renderer of a configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.records import Document, Part, Renderer, Source, Tokens
from areal_ray.data.sources import named_files
from areal_ray.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Files:
    """A Source of whole files, one document each."""

    config: DataConfig
    skipped: Counter[str] = field(default_factory=Counter)

    def parts(self) -> list[Part]:
        return [Part(str(path), size=path.stat().st_size) for _, path in named_files(self.config)]

    def read(self, part: Part) -> Iterator[Document]:
        try:
            yield Document(Path(part.path).read_bytes(), part.path)
        except OSError as error:
            raise ConfigError("data.paths", f"cannot read {part.path}: {error.strerror}") from None


@dataclass(frozen=True)
class Text:
    """A Renderer of text, its end marked."""

    tokenizer: Tokenizer
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def fingerprint(self) -> str:
        return type(self.tokenizer).__name__

    def __call__(self, document: Document) -> Iterator[Tokens]:
        assert isinstance(document.content, bytes)
        yield Tokens(self.tokenizer.encode(document.content))


def build_source(config: DataConfig) -> Source:
    """The Source that data.source names."""
    return Files(config)


def build_renderer(config: DataConfig, tokenizer: Tokenizer) -> Renderer:
    """The Renderer that fits the source."""
    return Text(tokenizer)

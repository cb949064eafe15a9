"""Source and renderer of a configuration."""

from __future__ import annotations

from areal_ray.config import DataConfig
from areal_ray.data.records import Renderer, Source
from areal_ray.data.rendering.records import Completion, Messages, Preference, RecordRenderer
from areal_ray.data.rendering.text import TextRenderer
from areal_ray.data.sources.files import Options
from areal_ray.data.sources.hub import Hub
from areal_ray.data.sources.jsonl import JsonLines
from areal_ray.data.sources.source import FileSource, TextFiles
from areal_ray.data.sources.stdlib import StandardLibrary
from areal_ray.data.sources.tables import Csv, Parquet
from areal_ray.data.tokenizers import Tokenizer

_FILES: dict[str, type[FileSource]] = {"text": TextFiles, "jsonl": JsonLines, "csv": Csv, "parquet": Parquet}
_RENDERERS: dict[str, type[RecordRenderer]] = {"messages": Messages, "completion": Completion, "preference": Preference}


def build_source(config: DataConfig, s3: Options | None = None) -> Source:
    """The Source that data.source names.

    Args:
        config: of one source.
        s3: endpoint, region and credentials of s3:// paths, see `storage_at`.
    """
    if config.source == "stdlib":
        return StandardLibrary(config)
    return Hub(config) if config.source == "hub" else _FILES[config.source](config, s3)


def build_renderer(config: DataConfig, tokenizer: Tokenizer) -> Renderer:
    """The Renderer of data.format.

    Raises:
        ConfigError: if the tokenizer lacks what it needs.
    """
    if config.format == "text":
        return TextRenderer(config, tokenizer)
    return _RENDERERS[config.format](config, tokenizer)

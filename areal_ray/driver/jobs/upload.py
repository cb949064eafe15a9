"""What a submitted job takes along: the current folder, with the experiment in it."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from areal_ray.cluster import ray_internals
from areal_ray.config import Config, ConfigError
from areal_ray.config.layers import GROUPS, merged_text, read_layers

LIMIT_BYTES = 100 << 20  # that the job server takes, compressed
_STAGED = "submitted_experiment"  # folder of an experiment that lies elsewhere


@dataclass(frozen=True)
class Upload:
    """A folder to upload.

    Args:
        folder: its path.
        config: the experiment's file, relative to it.
        overrides: key=value strings that are left for the command line.
    """

    folder: Path
    config: str
    overrides: tuple[str, ...]


@contextmanager
def upload(config: str, overrides: Sequence[str]) -> Iterator[Upload]:
    """The current folder as a job takes it along, while the block lasts.

    An experiment outside of it comes along as one file, with its groups put together, beside the Python files of its
    folder: an absolute path would mean nothing on another machine.

    Raises:
        ConfigError: if it is larger than the job server takes; names the largest files.
    """
    here, path = Path.cwd(), Path(config).resolve()
    if path.is_relative_to(here):
        check_size(here)
        yield Upload(here, os.path.relpath(path, here), tuple(overrides))
        return
    stage = Path(tempfile.mkdtemp(prefix="areal_ray-submit-"))
    try:
        for entry in here.iterdir():
            (stage / entry.name).symlink_to(entry)
        target = stage / _STAGED
        target.mkdir()
        for entry in path.parent.iterdir():
            if entry.suffix == ".py" or (entry / "__init__.py").is_file():
                (target / entry.name).symlink_to(entry)
        groups = [text for text in overrides if text.partition("=")[0] in GROUPS]
        (target / path.name).write_text(merged_text(read_layers(config, groups, Config)))
        check_size(stage)
        yield Upload(stage, f"{_STAGED}/{path.name}", tuple(text for text in overrides if text not in groups))
    finally:
        shutil.rmtree(stage)


def check_size(folder: Path) -> None:
    """Raise ConfigError, with the largest files, if a folder is larger than the job server takes."""
    files = ray_internals.uploaded_files(folder)
    if files is None or sum(files.values()) <= LIMIT_BYTES or _compressed(files) <= LIMIT_BYTES:
        return
    largest = sorted(files.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{path.relative_to(folder)} ({size / 1e6:,.0f} MB)" for path, size in largest)
    raise ConfigError(
        "",
        f"this folder is larger than the {LIMIT_BYTES >> 20} MiB that a job can take along: the largest files are "
        f"{named}. Name what the job does not need in a file .rayignore (the rules of .gitignore)",
        str(Path.cwd()),
    )


def _compressed(files: dict[Path, int]) -> int:
    """About the bytes of a zip of these files; counted no further than the limit."""
    total = 0
    for path in sorted(files, key=lambda path: -files[path]):
        compressor = zlib.compressobj(1)
        with path.open("rb") as file:
            while (block := file.read(1 << 20)) and total <= LIMIT_BYTES:
                total += len(compressor.compress(block))
        total += len(compressor.flush())
        if total > LIMIT_BYTES:
            break
    return total

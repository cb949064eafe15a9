"""Files of a source: found by name in an order that is the same on every machine, and opened whatever they are in."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from areal_ray.config import ConfigError
from areal_ray.storage import Storage, storage_at

Options = Mapping[str, str | None]  # of S3, see `storage_at`
DAMAGED = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error)  # what reading a damaged or cut off file raises
_LEFTOVERS = ("*~", "*.swp", "*.swo", "*.lock", "#*#", "Thumbs.db", "desktop.ini")
_CACHES = {"__pycache__"}
_PACKED = (".gz", ".zst", ".xz")
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\x00": "xz"}


@dataclass(frozen=True)
class File:
    """Args:
    name: relative to what all files have in common, by which they are sorted.
    path: absolute, or s3://...
    size: bytes.
    """

    name: str
    path: str
    size: int


@dataclass
class Files:
    """The files that patterns name.

    Args:
        found: sorted by name.
        left_out: how many files of directories are not taken, by what they are.
    """

    found: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find(patterns: Sequence[str], endings: Sequence[str] = (), s3: Options | None = None) -> Files:
    """The files that patterns name: themselves, as directories with all that is in them, or as globs.

    A file that is named is taken whatever it is called. Of a directory hidden files, those that editors and tools
    leave behind, and, if some have the endings, those with others are left out. Names, and with them the order, do not
    depend on where the files lie. Links to files are the files, under the names of the links (the cache of the Hugging
    Face hub has no others); links to folders are left out. Grows with the number of files: each is asked for its size.

    Args:
        patterns: of the local file system, or s3://bucket/prefix (without globs).
        endings: of names (.csv), before one that says how a file is compressed.
        s3: of s3:// paths.

    Raises:
        ConfigError: if a pattern matches nothing.
    """
    files, sizes = Files(), dict[str, int]()
    for pattern in patterns:
        matches = _remote(pattern, s3, files) if "://" in pattern else _local(pattern, files)
        others = [path for path in matches if not _ends(path, endings)]
        if endings and 0 < len(others) < len(matches):
            files.left_out[f"not {' or '.join(endings)}"] += len(others)
            for path in others:
                del matches[path]
        if not matches:
            hint = f" that is not left out ({_listed(files.left_out)})" if files.left_out else ""
            raise ConfigError("data.paths", f"no file matches {pattern!r}{hint}")
        sizes |= matches
    once: dict[str, str] = {}
    for path in sorted(sizes):
        once.setdefault(identity(path), path)
    sizes = {path: sizes[path] for path in once.values()}
    parts = {path: tuple(path.split("/")) for path in sizes}
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 for p in parts.values()):
        if len({p[common] for p in parts.values()}) > 1:
            break
        common += 1
    named = [(p[common:] if len(parts) > 1 else p[-1:], path) for path, p in parts.items()]
    files.found = sorted((File("/".join(name), path, sizes[path]) for name, path in named), key=lambda f: f.name)
    files.left_out += Counter()  # without zeros
    return files


def identity(path: str) -> str:
    """What is the same for all names of a file."""
    return path if "://" in path else os.path.realpath(path)


def left_out_note(files: Files) -> list[str]:
    """A line that says what was left out, if anything was."""
    return [f"data: left out {_listed(files.left_out)}"] if files.left_out else []


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def _ends(path: str, endings: Sequence[str]) -> bool:
    name = path.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return name.endswith(tuple(endings))


def _refusal(name: str) -> str | None:
    """Why a file or directory of this name is left out; None if it is not."""
    if name.startswith("."):
        return "hidden"
    if name in _CACHES:
        return "of caches"
    return "left by editors and tools" if any(fnmatch.fnmatch(name, each) for each in _LEFTOVERS) else None


def _local(pattern: str, files: Files) -> dict[str, int]:
    """Sizes of files by absolute path."""
    place = Path(os.path.expanduser(pattern))
    # What there is is itself before it is a pattern: a folder may have brackets in its name.
    if place.is_file():
        return {os.path.abspath(place): place.stat().st_size}
    found: list[str] = []
    for match in [place] if place.exists() else map(Path, sorted(glob.glob(str(place), recursive=True))):
        if match != place and (why := _refusal(match.name)) and not place.name.endswith(match.suffix or match.name):
            files.left_out[why] += 1
        elif match.is_dir():
            found += _walk(match, files)
        elif match.is_file():
            found.append(os.path.abspath(match))
    return {path: os.path.getsize(path) for path in found}


def _walk(root: Path, files: Files) -> Iterator[str]:
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        for name in sorted(folders):
            if why := _refusal(name):
                folders.remove(name)
                files.left_out[why] += sum(len(below) for _, _, below in os.walk(os.path.join(folder, name)))
            elif os.path.islink(os.path.join(folder, name)):  # which may lead back to where it is
                files.left_out["folders that are links"] += 1
        for name in sorted(names):
            path = os.path.join(folder, name)
            if why := _refusal(name):
                files.left_out[why] += 1
            elif os.path.isfile(path):
                yield os.path.abspath(path)


def _unreadable(error: OSError) -> None:
    # Not left out: another machine, or another user, would make another corpus of the same files.
    raise ConfigError("data.paths", f"cannot read {error.filename}: {error.strerror}")


def _remote(path: str, s3: Options | None, files: Files) -> dict[str, int]:
    storage, name = _parent(path, s3)
    size = storage.size(name)
    return {path: size} if size is not None else dict(_remote_walk(storage.sub(name), files))


def _remote_walk(storage: Storage, files: Files) -> Iterator[tuple[str, int]]:
    for name, size in storage.sizes().items():
        if why := _refusal(name):
            files.left_out[why] += 1
        else:
            yield f"{storage.location}/{name}", size
    for name in storage.directories(""):
        if _refusal(name) is None:
            yield from _remote_walk(storage.sub(name), files)


def _parent(path: str, s3: Options | None) -> tuple[Storage, str]:
    folder, _, name = path.rstrip("/").rpartition("/")
    try:
        return storage_at(folder, s3), name
    except ValueError as error:
        raise ConfigError("data.paths", str(error)) from None


class _Stream(io.RawIOBase):
    """A file of a Storage as the buffered readers of `io` want it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_plain(path: str, s3: Options | None = None) -> io.BufferedReader:
    """A file as it is, for reading, seekable (OSError)."""
    if "://" not in path:
        return open(path, "rb")
    storage, name = _parent(path, s3)
    return io.BufferedReader(_Stream(storage.open(name)), 1 << 20)


def compression(file: io.BufferedReader) -> str | None:
    """How a file is compressed by its first bytes, whatever it is called: gz, zst, xz or not at all."""
    begin = file.peek(6)
    return next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), None)


def open_file(path: str, s3: Options | None = None) -> BinaryIO:
    """The content of a file for reading, decompressed. Reading a damaged file raises one of `DAMAGED`."""
    file = open_plain(path, s3)
    packed = compression(file)
    if packed == "gz":
        return gzip.open(file)  # type: ignore[return-value]
    if packed == "xz":
        return io.BufferedReader(lzma.open(file))
    if packed == "zst":
        try:
            import pyarrow
        except ModuleNotFoundError:
            raise ConfigError("data.paths", f"{path}: Zstandard needs pyarrow, which is not installed") from None
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file

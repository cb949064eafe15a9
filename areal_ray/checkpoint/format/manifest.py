"""manifest.json: the last file of a checkpoint, which commits it.

In format 2, two files for each rank are listed, a shard and its table of checksums, so that what a commit does grows
with the ranks and not with the tensors. In format 1 the checksums of all tensors' parts were in the manifest, and their
places in `.metadata`; such checkpoints are read as before (format_1.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import xxhash

from areal_ray.storage import NotAFile, Storage, is_unreadable

MANIFEST = "manifest.json"
METADATA = ".metadata"
STATE = "state.json"
_MOST_DEPTH = 64  # of JSON; what Python parses may be too deep for all that looks at it then
_MOST = 2.5e11  # of numbers; as seconds shortly before the year 10000, which no calendar has
_COUNT, _SECONDS, _TABLE = (int,), (int, float), (dict,)
_INFO: dict[str, tuple[type, ...]] = {  # types of what is read of a manifest's info; the rest is shown as it is
    "step": _COUNT,
    "attempt": _COUNT,
    "world_size": _COUNT,
    "time": _SECONDS,
    "metrics": _TABLE,
    "mesh": _TABLE,
    "config": (dict, type(None)),
    "versions": _TABLE,
    "hf_config": (dict, type(None)),
    "tokenizer": (str, type(None)),
    "serving": _TABLE,
    "accumulate": (str,),
}
_MOST_BYTES = 1 << 30  # of a file that is read at once; the largest, a table of checksums, has 20 bytes for every MiB


class CheckpointDamaged(RuntimeError):
    """A directory is no good checkpoint; the message names the file and what is wrong with it, in one line.

    Args:
        text: the message; words of libraries and names in the checkpoint may be in it, which may have several lines.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


class CheckpointUnreadable(CheckpointDamaged):
    """A file of a checkpoint cannot be read, which may pass: of the input and output, or of a permission."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns an error of reading one file of a checkpoint into damage; of storage that is away, the error stays.

    Args:
        name: of the file, for the message.

    Raises:
        CheckpointDamaged: if there is no such file, or something else in its place, or it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise CheckpointDamaged(f"{name}: missing") from None
    except OSError as error:
        if not is_unreadable(error):
            raise
        kind = CheckpointDamaged if isinstance(error, NotAFile) else CheckpointUnreadable
        raise kind(f"{name}: cannot be read ({error.strerror or error})") from None


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and checksum (xxh3_128); in format 1 of its parts, too: [offset, length, xxh3_64]."""

    size: int
    xxh3_128: str
    chunks: list[list[Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        row = {"size": self.size, "xxh3_128": self.xxh3_128}
        return {**row, "chunks": self.chunks} if self.chunks else row


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Args:
        info: about the save: step, attempt, world_size, mesh, config_hash, versions, time; none of it needed to load.
        files: every other file of the directory, by name.
    """

    info: dict[str, Any]
    files: dict[str, FileRecord]
    format: int = 2

    @property
    def total_bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    def encode(self) -> bytes:
        files = {name: record.as_json() for name, record in self.files.items()}
        body = {"info": self.info, "files": files, "format": self.format}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True).encode()


def read_manifest(directory: Storage) -> Manifest:
    """The manifest of a committed checkpoint, its own checksum verified.

    Raises:
        CheckpointDamaged: if it is missing, torn or changed, or cannot be read.
    """
    with reading(MANIFEST):
        try:
            data = directory.read(MANIFEST)
        except FileNotFoundError:
            raise CheckpointDamaged(f"{MANIFEST}: missing, so the save was never finished") from None
    return decode_manifest(data)


def decode_manifest(data: bytes) -> Manifest:
    """The manifest from the bytes of its file, its own checksum verified.

    Raises:
        CheckpointDamaged: if it is torn or changed.
    """
    body = parse_json(data, MANIFEST)
    try:
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise CheckpointDamaged(f"{MANIFEST}: the checksum does not match")
        if body["format"] not in (1, 2):
            raise CheckpointDamaged(f"{MANIFEST}: format {body['format']} is not known to this version")
        if foreign := [name for name in body["files"] if "/" in name or name in ("", ".", "..")]:
            raise CheckpointDamaged(f"{MANIFEST}: {foreign[0]!r} is no name of a file in the checkpoint")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        if any(type(record.size) is not int or record.size < 0 for record in files.values()):
            raise CheckpointDamaged(f"{MANIFEST}: a file of a size that there is not")
        return Manifest(check_info(body["info"]), files, body["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{MANIFEST}: not readable ({type(error).__name__}: {error})") from None


def check_info(info: Any) -> dict[str, Any]:
    """The info of a manifest, or of a row of the index, if all that is read of it is of its type.

    Raises:
        ValueError: if something is not.
    """
    if type(info) is not dict:
        raise ValueError(f"info is a {type(info).__name__}")
    for key, types in _INFO.items():
        value = info.get(key)
        if key in info and type(value) not in types:
            raise ValueError(f"{key} is a {type(value).__name__}")
        if types in (_COUNT, _SECONDS) and value is not None and not 0 <= value < _MOST:  # nan is not
            raise ValueError(f"{key} is {value}")
    if wrong := [name for name, value in info.get("metrics", {}).items() if type(value) not in (int, float)]:
        raise ValueError(f"the metric {wrong[0]!r} is no number")
    return info


def check_sizes(directory: Storage, manifest: Manifest) -> None:
    """Compare every file's size with the manifest: cheap, and finds what is missing or cut short.

    Raises:
        CheckpointDamaged: for the first file that differs.
    """
    with reading("the directory"):
        sizes = directory.sizes()
    for name, record in manifest.files.items():
        size = sizes.get(name)
        if size != record.size:
            found = "missing" if size is None else f"{size} bytes"
            raise CheckpointDamaged(f"{name}: {found}, should be {record.size} bytes")


def verify(directory: Storage) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointDamaged: for the first file that differs.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    for name, record in manifest.files.items():
        digest = xxhash.xxh3_128()
        with reading(name):
            for block in directory.read_blocks(name, record.size):
                digest.update(block)
        if digest.hexdigest() != record.xxh3_128:
            raise CheckpointDamaged(f"{name}: the checksum does not match")
    return manifest


def read_checked(directory: Storage, name: str, manifest: Manifest) -> bytes:
    """All bytes of a small file, verified.

    Raises:
        CheckpointDamaged: if it is missing or differs.
    """
    if name not in manifest.files:
        raise CheckpointDamaged(f"{name}: not in the manifest")
    if manifest.files[name].size > _MOST_BYTES:
        raise CheckpointDamaged(f"{name}: of {manifest.files[name].size} bytes, which nothing that describes one has")
    with reading(name):
        data = directory.read_range(name, 0, manifest.files[name].size + 1)  # and not what has grown without end
    if xxhash.xxh3_128_hexdigest(data) != manifest.files[name].xxh3_128:
        raise CheckpointDamaged(f"{name}: the checksum does not match")
    return data


def parse_json(data: bytes, name: str) -> Any:
    """JSON from a file's bytes.

    Raises:
        CheckpointDamaged: if they are none, or nested deeper than anything in a checkpoint.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{name}: not readable ({type(error).__name__}: {error})") from None
    level, depth = [value], 0
    while level:
        if depth > _MOST_DEPTH:
            raise CheckpointDamaged(f"{name}: not readable (more than {_MOST_DEPTH} values in each other)")
        level = [below for each in level for below in _parts(each) if type(below) in (list, dict)]
        depth += 1
    return value


def _parts(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    return value if type(value) is list else ()


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

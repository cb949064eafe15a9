"""manifest.json: the last file of a checkpoint, which commits it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from areal_ray.storage import Storage

MANIFEST = "manifest.json"
METADATA = ".metadata"
STATE = "state.json"


class CheckpointDamaged(RuntimeError):
    """A directory is no good checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes, checksum of the whole (xxh3_128), and of its parts: [offset, length, xxh3_64]."""

    size: int
    xxh3_128: str
    chunks: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Args:
        info: about the save: step, attempt, world_size, mesh, config_hash, versions, time; none of it needed to load.
        files: every other file of the directory, by name.
    """

    info: dict[str, Any]
    files: dict[str, FileRecord]
    format: int = 1

    @property
    def total_bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    def encode(self) -> bytes:
        body = asdict(self)
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True).encode()


def read_manifest(directory: Storage) -> Manifest:
    """The manifest of a committed checkpoint, its own checksum verified.

    Raises:
        CheckpointDamaged: if it is missing, torn or changed.
    """
    try:
        body = json.loads(directory.read(MANIFEST))
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise CheckpointDamaged(f"{MANIFEST}: the checksum does not match")
        if body["format"] != 1:
            raise CheckpointDamaged(f"{MANIFEST}: format {body['format']} is not known to this version")
        if foreign := [name for name in body["files"] if "/" in name or name in ("", ".", "..")]:
            raise CheckpointDamaged(f"{MANIFEST}: {foreign[0]!r} is no name of a file in the checkpoint")
        return Manifest(body["info"], {name: FileRecord(**record) for name, record in body["files"].items()})
    except FileNotFoundError:
        raise CheckpointDamaged(f"{MANIFEST}: missing, so the save was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{MANIFEST}: not readable ({type(error).__name__}: {error})") from None


def check_sizes(directory: Storage, manifest: Manifest) -> None:
    """Compare every file's size with the manifest: cheap, and finds what is missing or cut short.

    Raises:
        CheckpointDamaged: for the first file that differs.
    """
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
    try:
        data = directory.read(name)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{name}: missing") from None
    if xxhash.xxh3_128_hexdigest(data) != manifest.files[name].xxh3_128:
        raise CheckpointDamaged(f"{name}: the checksum does not match")
    return data


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

"""A directory in S3 or in anything that speaks its protocol, over pyarrow.fs, as Ray Train's own storage is.

Objects have no directories, no appending and no renaming, and none of it is needed here: a name exists once its upload
is complete. What is written by one PUT or one multipart upload is durable when the call returns.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import UnsupportedOperation
from typing import Any, BinaryIO

from areal_ray.storage.read_ahead import read_ahead
from areal_ray.storage.s3_client import ATTEMPTS, EndOfObject, S3Client, with_environment

_BLOCK = 8 << 20  # of a large object that is read in several requests
_IN_FLIGHT = 64 << 20  # bytes of one upload that may be under way: pyarrow buffers without limit


class S3Storage:
    """Objects under `s3://bucket/prefix`; as `areal_ray.storage.Storage`.

    Args:
        uri: s3://bucket/prefix.
        options: endpoint (URL), region, access_key, secret_key, session_token; what is not given comes from the usual
            AWS variables, then from the profile files or the machine's role.
        attempts: per request.

    Raises:
        ValueError: if the URI is no place in a bucket.
    """

    can_append = False

    def __init__(self, uri: str, options: Mapping[str, str | None] | None = None, attempts: int = ATTEMPTS) -> None:
        scheme, _, path = uri.partition("://")
        if scheme != "s3" or "@" in path or "?" in path or path.startswith("/"):
            raise ValueError(
                f"{_shown(uri)}: must be s3://bucket/prefix; credentials and endpoint are given apart from it"
            )
        self._path = _checked(path.strip("/"), uri)
        self._client = S3Client(with_environment(options or {}), attempts)
        self._files = self._client.filesystem

    @property
    def location(self) -> str:
        return f"s3://{self._path}"

    @property
    def filesystem(self) -> Any:
        return self._files

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location, self._client.options, self._client.attempts)

    def sub(self, name: str) -> S3Storage:
        below = type(self).__new__(type(self))
        below._path, below._client, below._files = self._inside(name), self._client, self._files
        return below

    def names(self) -> list[str]:
        return sorted(info.base_name for info in self._list())

    def directories(self, prefix: str) -> list[str]:
        found = self._client.prefixes(f"{self._path}/{prefix}")
        return [path.removeprefix(f"{self._path}/").rstrip("/") for path in found]

    def stamp(self, name: str) -> None:
        return None

    def sizes(self) -> dict[str, int]:
        return {info.base_name: int(info.size) for info in self._list() if info.is_file}

    def size(self, name: str) -> int | None:
        with self._client.plain_errors(self.location):
            info = self._files.get_file_info(self._inside(name))
        return int(info.size) if info.is_file else None

    def make(self) -> None:
        if self._list():
            raise FileExistsError(f"{self.location} exists")

    def ensure(self, private: bool = False) -> None: ...

    @contextmanager
    def create(self, name: str) -> Iterator[_Upload]:
        path = self._inside(name)
        if self.size(name) is not None:
            raise FileExistsError(f"s3://{path} exists")
        with self._client.plain_errors(self.location):
            stream = self._files.open_output_stream(path)
            try:
                yield _Upload(stream)
            except BaseException:
                # pyarrow cannot give up an upload: what there is becomes an object when the stream goes.
                with suppress(OSError):
                    stream.close()
                    self._files.delete_file(path)
                raise
            stream.close()

    @contextmanager
    def create_whole(self, name: str) -> Iterator[_Upload]:
        # Under another name first: an upload that fails becomes an object all the same, and here it might take the
        # place of another writer's whole one. The server copies it; no bytes come back.
        temporary = f"{name}.{secrets.token_hex(8)}.tmp"
        with self.create(temporary) as upload:
            yield upload
        with self._client.plain_errors(self.location):
            self._files.move(self._inside(temporary), self._inside(name))

    def replace(self, name: str, data: bytes) -> None:
        # In one request, where pyarrow takes three: every line of a log is one of these.
        self._client.request("put_object", self._inside(name), Body=data)

    def publish(self, name: str, data: bytes) -> None:
        # The one request that pyarrow does not have: If-None-Match makes the first of two writers the only one.
        try:
            self._client.request("put_object", self._inside(name), Body=data, IfNoneMatch="*")
        except FileExistsError:
            if self.read(name) != data:  # else it is our own, and the answer to a first try was lost
                raise FileExistsError(f"{self.location}/{name} exists") from None

    def append(self, name: str, data: bytes) -> None:
        raise UnsupportedOperation(f"{self.location}/{name}: objects cannot be appended to")

    def truncate(self, name: str, size: int) -> None:
        raise UnsupportedOperation(f"{self.location}/{name}: objects cannot be cut off")

    def open(self, name: str) -> BinaryIO:
        with self._client.plain_errors(self.location):
            return _Download(self._files.open_input_file(self._inside(name)), self, name)  # type: ignore[return-value]

    def read(self, name: str) -> bytes:
        # In one request: pyarrow asks for the size first, and what is replaced in between would be torn.
        return bytes(self._client.request("get_object", self._inside(name))["Body"].read())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        part = f"bytes={offset}-{offset + length - 1}"
        try:
            return bytes(self._client.request("get_object", self._inside(name), Range=part)["Body"].read())
        except EndOfObject:
            return b""

    def read_blocks(self, name: str, size: int) -> Iterator[bytes]:
        offsets = range(0, size, _BLOCK)
        return read_ahead((_BLOCK, partial(self.read_range, name, offset, _BLOCK)) for offset in offsets)

    def remove(self, name: str) -> None:
        with self._client.plain_errors(self.location):
            self._files.delete_file(self._inside(name))

    def set_aside(self, name: str) -> str:
        raise UnsupportedOperation(f"{self.location}/{name}: objects cannot be given another name")

    def delete(self) -> None:
        with self._client.plain_errors(self.location):
            self._files.delete_dir(self._path)

    def _list(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._client.plain_errors(self.location):
            found = self._files.get_file_info(FileSelector(self._path, allow_not_found=True))
        return [info for info in found if info.base_name]

    def _inside(self, name: str) -> str:
        return f"{self._path}/{_checked(name, name)}"


class _Download:
    """A file for reading, with plain errors."""

    def __init__(self, file: Any, storage: S3Storage, name: str) -> None:
        self._file, self._storage, self._name = file, storage, name

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = None) -> bytes:
        try:
            with self._storage._client.plain_errors(self._storage.location):
                return bytes(self._file.read(size))
        except OSError:
            if self._storage.size(self._name) is None:  # deleted since it was opened
                raise FileNotFoundError(f"{self._storage.location}/{self._name}") from None
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Upload:
    """Bounds what is buffered: a storage slower than the writer must not fill the memory."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._waiting = stream, 0

    def write(self, data: bytes | memoryview, /) -> int:
        self._stream.write(data)
        self._waiting += len(data)
        if self._waiting >= _IN_FLIGHT:
            self._stream.flush()
            self._waiting = 0
        return len(data)


def _checked(path: str, shown: str) -> str:
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{shown!r} is not a name inside a bucket")
    return path


def _shown(uri: str) -> str:
    return re.sub(r"//.*@", "//***@", uri).partition("?")[0]  # a secret may have a slash in it

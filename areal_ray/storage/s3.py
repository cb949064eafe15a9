"""A directory in S3 or in anything that speaks its protocol, over pyarrow.fs, as Ray Train's own storage is.

Objects have no directories, no appending and no renaming, and none of it is needed here: a name exists once its upload
is complete. What is written by one PUT or one multipart upload is durable when the call returns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from typing import Any, BinaryIO

_ATTEMPTS = 6  # per request; waits in between add up to about ten seconds
_IN_FLIGHT = 64 << 20  # bytes of one upload that may be under way: pyarrow buffers without limit
_CODE = re.compile(r"AWS Error (\w+(?: \(HTTP status \d+\))?) during (\w+) operation: (.*)", re.S)
_DENIED = re.compile(
    r"access_?denied|signature_?does_?not_?match|invalid_?(access_?key|signature|token)|expired_?token", re.I
)
_ENVIRONMENT = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "access_key": ("AWS_ACCESS_KEY_ID",),
    "secret_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN",),
}


class S3Storage:
    """Objects under `s3://bucket/prefix`; as `areal_ray.storage.Storage`.

    Args:
        uri: s3://bucket/prefix.
        options: endpoint (URL), region, access_key, secret_key, session_token; what is not given comes from the usual
            AWS variables, then from the profile files or the machine's role.

    Raises:
        ValueError: if the URI is no place in a bucket.
    """

    can_append = False

    def __init__(self, uri: str, options: Mapping[str, str | None] | None = None) -> None:
        scheme, _, path = uri.partition("://")
        if scheme != "s3" or "@" in path or "?" in path or path.startswith("/"):
            raise ValueError(
                f"{_shown(uri)}: must be s3://bucket/prefix; credentials and endpoint are given apart from it"
            )
        self._path = _checked(path.strip("/"), uri)
        self._options = with_environment(options or {})
        self._files = filesystem(self._options)
        self._clients: list[Any] = []  # one at most, shared with what is below

    @property
    def location(self) -> str:
        return f"s3://{self._path}"

    @property
    def filesystem(self) -> Any:
        return self._files

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self.location, self._options)

    def sub(self, name: str) -> S3Storage:
        below = S3Storage.__new__(S3Storage)
        below._path, below._options = self._inside(name), self._options
        below._files, below._clients = self._files, self._clients
        return below

    def names(self) -> list[str]:
        return sorted(info.base_name for info in self._list())

    def sizes(self) -> dict[str, int]:
        return {info.base_name: int(info.size) for info in self._list() if info.is_file}

    def size(self, name: str) -> int | None:
        with self._plain_errors():
            info = self._files.get_file_info(self._inside(name))
        return int(info.size) if info.is_file else None

    def make(self) -> None:
        if self._list():
            raise FileExistsError(f"{self.location} exists")

    def ensure(self) -> None: ...

    @contextmanager
    def create(self, name: str) -> Iterator[_Upload]:
        path = self._inside(name)
        if self.size(name) is not None:
            raise FileExistsError(f"s3://{path} exists")
        with self._plain_errors():
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

    def replace(self, name: str, data: bytes) -> None:
        with self._plain_errors(), self._files.open_output_stream(self._inside(name)) as stream:
            stream.write(data)

    def publish(self, name: str, data: bytes) -> None:
        # The one request that pyarrow does not have: If-None-Match makes the first of two writers the only one.
        try:
            self._request("put_object", name, Body=data, IfNoneMatch="*")
        except FileExistsError:
            if self.read(name) != data:  # else it is our own, and the answer to a first try was lost
                raise FileExistsError(f"{self.location}/{name} exists") from None

    def append(self, name: str, data: bytes) -> None:
        raise UnsupportedOperation(f"{self.location}/{name}: objects cannot be appended to")

    def open(self, name: str) -> BinaryIO:
        with self._plain_errors():
            return _Download(self._files.open_input_file(self._inside(name)), self, name)  # type: ignore[return-value]

    def read(self, name: str) -> bytes:
        # In one request: pyarrow asks for the size first, and what is replaced in between would be torn.
        return bytes(self._request("get_object", name)["Body"].read())

    def remove(self, name: str) -> None:
        with self._plain_errors():
            self._files.delete_file(self._inside(name))

    def delete(self) -> None:
        with self._plain_errors():
            self._files.delete_dir(self._path)

    def _list(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._plain_errors():
            found = self._files.get_file_info(FileSelector(self._path, allow_not_found=True))
        return [info for info in found if info.base_name]

    def _inside(self, name: str) -> str:
        return f"{self._path}/{_checked(name, name)}"

    def _request(self, operation: str, name: str, **arguments: Any) -> Any:
        """A request through botocore, its errors as those of a file system."""
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self._inside(name).partition("/")
        if not self._clients:
            self._clients.append(_client(self._options))
        try:
            return getattr(self._clients[0], operation)(Bucket=bucket, Key=key, **arguments)
        except ClientError as error:
            code, text = error.response.get("Error", {}).get("Code", ""), self._safe(f"s3://{bucket}/{key}: {error}")
            raise _KINDS.get(code, _kind(code))(text) from None
        except BotoCoreError as error:
            raise OSError(self._safe(f"s3://{bucket}/{key}: {error}")) from None

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """What the server said, in one line and as the kind of error that it is; never a credential."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            found = _CODE.search(str(error))
            if found is None:
                raise
            code, operation, detail = found.groups()
            text = f"{self.location}: {code} ({operation}): {' '.join(detail.split())[:300]}"
            raise _kind(f"{code} {detail}")(self._safe(text)) from None

    def _safe(self, text: str) -> str:
        for name in ("access_key", "secret_key", "session_token"):
            if value := self._options.get(name):
                text = text.replace(value, "***")
        return text


class _Download:
    """A file for reading, whose errors are plain."""

    def __init__(self, file: Any, storage: S3Storage, name: str) -> None:
        self._file, self._storage, self._name = file, storage, name

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = None) -> bytes:
        try:
            with self._storage._plain_errors():
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


def with_environment(options: Mapping[str, str | None]) -> dict[str, str]:
    """The options that are set, with what they leave open from the AWS variables. Keys come from one place together."""
    own_keys = any(options.get(name) for name in ("access_key", "secret_key"))
    chosen = {}
    for name, variables in _ENVIRONMENT.items():
        key_part = name in ("access_key", "secret_key", "session_token")
        found = options.get(name)
        if not found and not (own_keys and key_part):
            found = next((os.environ[variable] for variable in variables if os.environ.get(variable)), None)
        if found:
            chosen[name] = found
    return chosen


def filesystem(options: Mapping[str, str]) -> Any:
    """The pyarrow filesystem for these options; Ray Train takes the same."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    return S3FileSystem(
        access_key=options.get("access_key"),
        secret_key=options.get("secret_key"),
        session_token=options.get("session_token"),
        region=options.get("region"),
        endpoint_override=options.get("endpoint"),
        # Throttling, 5xx and broken connections are tried again by the AWS SDK, with growing waits.
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def _client(options: Mapping[str, str]) -> Any:
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=options.get("endpoint"),
        region_name=options.get("region"),
        aws_access_key_id=options.get("access_key"),
        aws_secret_access_key=options.get("secret_key"),
        aws_session_token=options.get("session_token"),
        config=Config(
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            s3={"addressing_style": "path"} if options.get("endpoint") else None,
        ),
    )


_KINDS: dict[str, type[OSError]] = {
    "PreconditionFailed": FileExistsError,
    "ConditionalRequestConflict": FileExistsError,
    "NoSuchKey": FileNotFoundError,
}


def _kind(text: str) -> type[OSError]:
    """pyarrow spells the server's codes in capitals, botocore as the server does."""
    return PermissionError if _DENIED.search(text) else OSError


def _checked(path: str, shown: str) -> str:
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{shown!r} is not a name inside a bucket")
    return path


def _shown(uri: str) -> str:
    return re.sub(r"//.*@", "//***@", uri).partition("?")[0]  # a secret may have a slash in it

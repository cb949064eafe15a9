"""How S3 is reached: credentials and endpoint, the clients of pyarrow and botocore, and their errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

ATTEMPTS = 6  # waits in between add up to about ten seconds
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


class EndOfObject(OSError):
    """A range begins behind the end of its object."""


_KINDS: dict[str, type[OSError]] = {
    "PreconditionFailed": FileExistsError,
    "ConditionalRequestConflict": FileExistsError,
    "NoSuchKey": FileNotFoundError,
    "InvalidRange": EndOfObject,
}


class S3Client:
    """The clients of pyarrow and botocore for one account, with errors as those of a file system.

    Args:
        options: endpoint, region and keys, see `with_environment`.
        attempts: per request.
    """

    def __init__(self, options: Mapping[str, str], attempts: int = ATTEMPTS) -> None:
        self.options, self.attempts = dict(options), attempts

    @cached_property
    def filesystem(self) -> Any:
        """The pyarrow filesystem; Ray Train takes the same."""
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        return S3FileSystem(
            access_key=self.options.get("access_key"),
            secret_key=self.options.get("secret_key"),
            session_token=self.options.get("session_token"),
            region=self.options.get("region"),
            endpoint_override=self.options.get("endpoint"),
            # Throttling, 5xx and broken connections are tried again by the AWS SDK, with growing waits.
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=self.attempts),
        )

    @cached_property
    def _botocore(self) -> Any:
        import botocore.session
        from botocore.config import Config

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.options.get("endpoint"),
            region_name=self.options.get("region"),
            aws_access_key_id=self.options.get("access_key"),
            aws_secret_access_key=self.options.get("secret_key"),
            aws_session_token=self.options.get("session_token"),
            config=Config(
                retries={"mode": "standard", "total_max_attempts": self.attempts},
                s3={"addressing_style": "path"} if self.options.get("endpoint") else None,
            ),
        )

    def request(self, operation: str, path: str, **arguments: Any) -> Any:
        """A request through botocore.

        Args:
            operation: of botocore's client.
            path: bucket/key.
            arguments: of the operation, beside these.

        Raises:
            OSError: with the server's words; FileNotFoundError, FileExistsError, PermissionError where it is that.
        """
        bucket, _, key = path.partition("/")
        return self._answer(operation, path, Bucket=bucket, Key=key, **arguments)

    def prefixes(self, path: str) -> list[str]:
        """The bucket and keys up to their next `/`, with it, of all objects whose begin with `path` (OSError)."""
        bucket, _, key = path.partition("/")
        found: list[str] = []
        more: dict[str, str] = {}
        while True:  # botocore's paginator, with its errors as everywhere
            page = self._answer("list_objects_v2", path, Bucket=bucket, Prefix=key, Delimiter="/", **more)
            found += [f"{bucket}/{each['Prefix']}" for each in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _answer(self, operation: str, path: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._botocore, operation)(**arguments)
        except ClientError as error:
            code, text = error.response.get("Error", {}).get("Code", ""), self._redacted(f"s3://{path}: {error}")
            raise _KINDS.get(code, _kind(code))(text) from None
        except BotoCoreError as error:
            raise OSError(self._redacted(f"s3://{path}: {error}")) from None

    @contextmanager
    def plain_errors(self, location: str) -> Iterator[None]:
        """Turns pyarrow's errors into one line with the server's words, of the kind that they are, without secrets."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            found = _CODE.search(str(error))
            if found is None:
                raise
            code, operation, detail = found.groups()
            text = f"{location}: {code} ({operation}): {' '.join(detail.split())[:300]}"
            raise _kind(f"{code} {detail}")(self._redacted(text)) from None

    def _redacted(self, text: str) -> str:
        for name in ("access_key", "secret_key", "session_token"):
            if value := self.options.get(name):
                text = text.replace(value, "***")
        return text


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


def _kind(text: str) -> type[OSError]:
    """pyarrow spells the server's codes in capitals, botocore as the server does."""
    return PermissionError if _DENIED.search(text) else OSError

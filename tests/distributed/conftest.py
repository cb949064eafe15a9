"""What the tests on the S3 server ask for: a directory of their own on it, the proxy's view of it, its keys."""

from __future__ import annotations

from uuid import uuid4

import pytest

from areal_ray.storage import Storage, s3, storage_at
from tests.s3_proxy import S3Proxy
from tests.s3_server import S3Server


@pytest.fixture
def uri() -> str:
    """Of a directory that nobody else uses."""
    return f"s3://runs/{uuid4().hex}/run"


@pytest.fixture
def storage(server: S3Server, uri: str) -> Storage:
    return storage_at(uri, server.options)


@pytest.fixture
def proxied(proxy: S3Proxy, server: S3Server, uri: str) -> Storage:
    return storage_at(uri, {**server.options, "endpoint": proxy.endpoint})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again for ten seconds; to be asked for before the storage is opened."""
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server and its keys as variables."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.environment

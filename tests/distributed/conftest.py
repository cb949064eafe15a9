"""The name of a run whose state is copied to memory; and on the S3 server a directory of a test's own, its keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from uuid import uuid4

import pytest

from areal_ray.processes.memory_keeper import claim
from areal_ray.storage import Storage, s3, storage_at
from tests.distributed.partner_attempts import Nodes, made_up
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
    monkeypatch.setattr(s3, "S3Storage", partial(s3.S3Storage, attempts=1))


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server and its keys as variables."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.environment


@pytest.fixture
def name() -> Iterator[str]:
    """Of a run; the copies in memory that its ranks have left are let go."""
    name = uuid4().hex
    yield name
    for rank in range(2):
        for file in claim(f"{name}-{rank}"):
            os.close(file)


@pytest.fixture
def nodes(name: str) -> Iterator[Nodes]:
    """Made-up nodes of that run."""
    with made_up(name) as nodes:
        yield nodes

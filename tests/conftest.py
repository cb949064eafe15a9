"""What tiers share: one S3 server for all tests, and a proxy before it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_proxy import S3Proxy
from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Serves whenever a test begins: who stops it starts it again."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def proxy(server: S3Server) -> Iterator[S3Proxy]:
    proxy = S3Proxy(server.options["endpoint"])
    proxy.start()
    yield proxy
    proxy.stop()

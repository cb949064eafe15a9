"""Fixtures of all tiers: an S3 server with a proxy before it. A test has the marker of its tier, the folder's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_proxy import S3Proxy
from tests.s3_server import S3Server

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses tests without the marker of their tier, which `-m` would leave out unnoticed; sorts the others."""
    tiers = {item: item.path.relative_to(HERE).parts[0] for item in items}
    wrong = {
        f"{item.path.relative_to(HERE)}: {tier}" for item, tier in tiers.items() if not item.get_closest_marker(tier)
    }
    if wrong:
        raise pytest.UsageError("no marker of the tier, `pytestmark = pytest.mark.TIER`:\n" + "\n".join(sorted(wrong)))
    if hasattr(config, "workerinput"):  # of `pytest -n 2`: the longest tier first
        items.sort(key=lambda item: tiers[item] != "ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n 2`: hands out tests file by file, and the Ray tier, which shares a cluster, as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "tests/ray" if path.startswith("tests/ray/") else path

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server of this process. It serves whenever a test begins: a test that stops it starts it again."""
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

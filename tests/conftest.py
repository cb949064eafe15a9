"""Fixtures of all tiers: an S3 server with a proxy before it. A test has the marker of its tier, the folder's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_proxy import S3Proxy
from tests.s3_server import S3Server

HERE = Path(__file__).parent
_ALONE = ("test_chaos.py", "test_elastic.py", "test_verify_resume.py")  # of tests/ray: have clusters of their own


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses tests without the marker of their tier, which `-m` would leave out unnoticed; sorts the others."""
    tiers = {item: item.path.relative_to(HERE).parts[0] for item in items}
    wrong = {
        f"{item.path.relative_to(HERE)}: {tier}" for item, tier in tiers.items() if not item.get_closest_marker(tier)
    }
    if wrong:
        raise pytest.UsageError("no marker of the tier, `pytestmark = pytest.mark.TIER`:\n" + "\n".join(sorted(wrong)))
    if hasattr(config, "workerinput"):  # of `pytest -n 2`
        order = _order(list(dict.fromkeys(item.path for item in items)))
        items.sort(key=lambda item: order[item.path])


def _order(files: list[Path]) -> dict[Path, float]:
    """Places of files: what shares a cluster first, as one process has it for most of the time; the other one meets
    the long files of the Ray tier here and there among the short ones, and none is left for the end."""
    shared = [file for file in files if _shares_cluster(str(file.relative_to(HERE.parent)))]
    alone = [file for file in files if file.name in _ALONE]
    others = [file for file in files if file not in shared and file not in alone]
    places = {file: (number + 0.5) / len(others) for number, file in enumerate(others)}
    return places | dict.fromkeys(shared, 0.0) | {file: (n + 1) / (len(alone) + 2) for n, file in enumerate(alone)}


def _shares_cluster(path: str) -> bool:
    return path.startswith("tests/ray/") and not path.endswith(_ALONE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n 2`: hands out tests file by file, and those that share a cluster as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "tests/ray" if _shares_cluster(path) else path

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

"""Requests of starts, restarts, lists and saves in object storage: as many with many checkpoints as with a few."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from areal_ray.checkpoint import Catalog, read_manifest
from areal_ray.checkpoint.retention import Retention
from areal_ray.cli.main import main as run_cli
from areal_ray.config import KeepConfig
from areal_ray.controller import snapshot
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.storage import Storage, s3_client
from areal_ray.tools import checkpoints
from areal_ray.worker.start import Start
from tests.distributed.s3 import save_box
from tests.s3_proxy import S3Proxy

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def requests(proxy: S3Proxy) -> Callable[[Callable[[], object]], list[str]]:
    def of(work: Callable[[], object]) -> list[str]:
        proxy.methods.clear()
        work()
        return list(proxy.methods)

    return of


def restart(run: Storage) -> None:
    directory, catalog = RunDir(run), Catalog(run)
    catalog.last_committed()
    directory.next_attempt(catalog.last_attempt())
    Start(1, directory, Ranks(), print, catalog).left_out_steps()
    directory.rewind_metrics(directory.reached())
    catalog.newest()
    Retention(catalog, KeepConfig(), list, print, print).clean_up(99)


def test_requests_do_not_grow_with_checkpoints(
    storage: Storage, proxied: Storage, requests: Callable[[Callable[[], object]], list[str]]
) -> None:
    found = []
    for count in (4, 24):
        for step in range(1 if count == 4 else 5, count + 1):
            save_box(storage, step)
        snapshot.rebuild(storage)
        retention = Retention(Catalog(proxied), KeepConfig(last=2, every_steps=1), list, print, print)
        retention.apply()
        manifest = read_manifest(save_box(storage, count + 100))
        found.append(
            [
                requests(lambda: checkpoints.listing(proxied)),
                requests(lambda: snapshot.rebuild(proxied)),
                requests(lambda: restart(proxied)),
                requests(lambda: retention.committed(f"step-{count + 100:08}.a1", manifest)),  # noqa: B023
            ]
        )
        storage.sub(f"step-{count + 100:08}.a1").delete()
    assert found[0] == found[1]
    assert [len(methods) for methods in found[0][:2]] == [4, 6]  # a listing, the index; manifest and sizes of the new


def test_a_list_of_more_than_one_page_is_whole(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(7):
        storage.sub(f"step-{step:08}.a1").replace("manifest.json", b"")
    answer = s3_client.S3Client._answer
    pages = []

    def small(self: s3_client.S3Client, operation: str, path: str, **arguments: object) -> object:
        if operation == "list_objects_v2":
            arguments["MaxKeys"] = 3
            pages.append(path)
        return answer(self, operation, path, **arguments)

    monkeypatch.setattr(s3_client.S3Client, "_answer", small)
    assert sorted(storage.directories("step-")) == [f"step-{step:08}.a1" for step in range(7)]
    assert len(pages) == 3


def test_what_a_deletion_that_broke_off_left_is_found_and_cleaned_up(storage: Storage) -> None:
    for step in (1, 2, 3):
        save_box(storage, step)
    snapshot.rebuild(storage)
    said: list[str] = []
    retention = Retention(Catalog(storage), KeepConfig(last=1), list, said.append, said.append)
    listed = json.loads(storage.read("checkpoints.json"))["checkpoints"]
    assert list(listed) == [f"step-0000000{step}.a1" for step in (3, 2, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage), "delete", lambda _: (_ for _ in ()).throw(OSError("down")))
        retention.apply()
    assert said == [f"could not delete step-0000000{step}.a1: down" for step in (2, 1)]
    assert [row["state"] == "good" for row in checkpoints.listing(storage)] == [False, False, True]
    Retention(Catalog(storage), KeepConfig(last=1), list, said.append, said.append).clean_up(2)
    assert [row["step"] for row in checkpoints.listing(storage)] == [3]


def test_repair_does_not_believe_the_index(storage: Storage, environment: dict[str, str], capfd: Any) -> None:
    for step in (1, 2, 3):
        save_box(storage, step)
    snapshot.rebuild(storage)
    storage.sub("step-00000002.a1").remove("shard-00000.distcp")
    assert [row["state"] for row in checkpoints.listing(storage)] == ["good"] * 3
    for _ in range(2):  # once with an index, once without one of its own making
        assert run_cli(["ckpt", "repair", storage.location]) == 0
        assert capfd.readouterr().out == "2 checkpoints: step-00000001.a1, step-00000003.a1\n"
    assert [row["state"] == "good" for row in checkpoints.listing(storage)] == [True, False, True]

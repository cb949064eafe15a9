"""An S3 server that is busy, loses answers and is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from areal_ray.storage import Storage, storage_at
from tests.distributed.s3 import DOWN, outage, write
from tests.s3_proxy import S3Proxy
from tests.s3_server import S3Server

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda storage: storage.names() == ["a"], id="names"),
        pytest.param(lambda storage: storage.size("a") == 5, id="size"),
        pytest.param(lambda storage: storage.read("a") == b"there", id="read"),
        pytest.param(lambda storage: storage.replace("b", b"1") or storage.read("b") == b"1", id="replace"),
        pytest.param(lambda storage: storage.publish("b", b"1") or storage.read("b") == b"1", id="publish"),
        pytest.param(lambda storage: storage.remove("a") or storage.names() == [], id="remove"),
    ],
)
def test_a_server_that_is_busy_for_a_while_is_asked_again(
    storage: Storage, proxy: S3Proxy, proxied: Storage, work: Callable[[Storage], bool]
) -> None:
    write(storage, "a", b"there")
    proxy.busy = 2
    assert work(proxied)
    assert proxy.busy == 0


def test_publishing_is_fine_if_the_answer_is_lost(proxy: S3Proxy, proxied: Storage) -> None:
    proxy.lost = 1
    proxied.publish("a", b"mine")
    assert proxy.methods[:2] == ["PUT", "PUT"]
    assert proxied.read("a") == b"mine"


def test_a_server_that_stays_busy_is_an_error(
    impatient: None, storage: Storage, proxy: S3Proxy, proxied: Storage
) -> None:
    write(storage, "a", b"there")
    proxy.busy = 1000
    for work in (proxied.names, lambda: proxied.replace("b", b""), lambda: proxied.publish("b", b"")):
        with pytest.raises(OSError, match=r"SLOW_DOWN|SlowDown"):
            work()
    assert storage.names() == ["a"]


def test_a_server_that_is_down_is_no_empty_directory(impatient: None, server: S3Server, uri: str) -> None:
    storage = storage_at(uri, server.options)
    write(storage, "a", b"1")
    works: list[Callable[[], Any]] = [
        storage.names,
        storage.sizes,
        storage.make,
        lambda: storage.size("a"),
        lambda: storage.read("a"),
        lambda: storage.open("a"),
        lambda: storage.replace("a", b""),
        lambda: storage.publish("a", b""),
        lambda: storage.remove("a"),
        storage.delete,
    ]
    with outage(server):
        for work in works:
            with pytest.raises(OSError, match=DOWN) as caught:
                work()
            assert type(caught.value) is OSError
    assert storage.read("a") == b"1"

"""What the tests on an S3 server share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from areal_ray.checkpoint import Catalog, save
from areal_ray.distributed import Ranks
from areal_ray.storage import Storage
from tests.s3_server import S3Server
from tests.unit.checkpoint.boxes import Box, weights

# What an operation on a server that is down says: that it is, and not that nothing is there.
DOWN = "NETWORK_CONNECTION|Could not connect to the endpoint"


@contextmanager
def outage(server: S3Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


def write(storage: Storage, name: str, data: bytes) -> None:
    with storage.create(name) as file:
        file.write(data)


def save_box(run: Storage, step: int, attempt: int = 1, value: float = 1.0) -> Storage:
    directory = run.sub(Catalog.name(step, attempt))
    save(directory, {"box": Box(**weights(value))}, {"step": step, "attempt": attempt}, Ranks())
    return directory


def flip(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]

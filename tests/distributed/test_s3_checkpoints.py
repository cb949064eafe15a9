"""Checkpoints in object storage, saved and loaded by two ranks, with a server that is away for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from typing import Any
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter, Catalog, SyncWriter, load, save
from areal_ray.checkpoint.reader import StoredState
from areal_ray.distributed import Ranks
from areal_ray.storage import Storage, storage_at
from areal_ray.storage.s3 import S3Storage
from areal_ray.tools import checkpoints
from areal_ray.train.recovery import PendingSave, RecoverHandler, SavePolicy
from tests.distributed.ranks import run_ranks
from tests.distributed.s3 import flip
from tests.distributed.small import FINE, attempt, differing, erase, snapshot, start_engine, train
from tests.s3_server import S3Server
from tests.unit.checkpoint.boxes import Box

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


class Switch:
    """Stops and starts the server when a rank says so, which is another process and must not own it."""

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._listener = Listener(("127.0.0.1", 0), authkey=b"tests")
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> tuple[str, int]:
        self._thread.start()
        return self._listener.address  # type: ignore[return-value]

    def __exit__(self, *_: object) -> None:
        turn(self._listener.address, "end")  # type: ignore[arg-type]
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        wanted = ""
        while wanted != "end":
            with self._listener.accept() as connection:
                wanted = connection.recv()
                if wanted == "stop":
                    self._server.stop()
                if wanted == "start":
                    self._server.start()
                connection.send(wanted)


def turn(switch: tuple[str, int], what: str) -> None:
    with Client(switch, authkey=b"tests") as connection:
        connection.send(what)
        connection.recv()


class Heard:
    """A Journal: what was said to it."""

    def __init__(self) -> None:
        self.passed: list[tuple[str, str]] = []

    def begins(self, checkpoint: str, step: int) -> None: ...

    def saved(self, dump: PendingSave, blocked_s: float, waited_s: float, total_s: float) -> None: ...

    def skipped(self, step: int) -> None: ...

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self.passed.append((checkpoint, reason))


def save_and_load(rank: int, run: Storage, switch: tuple[str, int]) -> dict[str, Any]:
    """Saves at once and beside the training, damage, and a server that is away for a while."""
    assert isinstance(run, S3Storage)
    run = S3Storage(run.location, run._client.options, attempts=1)
    engine = start_engine()
    state, seen = {"engine": engine.state}, {}
    writer = AsyncWriter(Ranks(), Ranks(dist.new_group(backend="gloo")))

    def restored(name: str) -> dict[str, Any]:
        erase(engine)
        load(run.sub(name), state, Ranks())
        return snapshot(engine)

    def first(work: Callable[[], Any]) -> None:
        if rank == 0:
            work()
        dist.barrier()

    # Each in the state after another step.
    train(engine, seed=0, fence=writer.fence)
    right = {1: snapshot(engine)}
    save(run.sub("step-00000001.a1"), state, {"step": 1, "attempt": 1}, Ranks())
    for step in (2, 3, 4):
        train(engine, seed=step, fence=writer.fence)
        right[step] = snapshot(engine)
        begun = writer.begin(run.sub(f"step-{step:08d}.a1"), state, {"step": step, "attempt": 1})
    train(engine, seed=5, fence=writer.fence)
    begun.result(60)
    for step, what in right.items():
        seen[f"step {step}"] = differing(restored(f"step-{step:08d}.a1"), what)

    def outage() -> tuple[Any, Any]:
        """What becomes of a save of either kind; training goes on in between."""
        at_once = attempt(lambda: save(run.sub("never"), state, {}, Ranks()))
        train(engine, seed=6, fence=writer.fence)
        return at_once, attempt(lambda: writer.begin(run.sub("never"), state, {}).result(60))

    train(engine, seed=5, fence=writer.fence)
    first(lambda: turn(switch, "stop"))
    seen["down"] = outage()
    first(lambda: turn(switch, "start"))
    after = snapshot(engine)
    seen["up"] = [
        attempt(lambda: save(run.sub("up"), state, {}, Ranks())),
        attempt(lambda: writer.begin(run.sub("up beside"), state, {}).result(60)),
    ]
    seen["saved when up"] = [differing(restored(name), after) for name in ("up", "up beside")]
    seen["older when up"] = differing(restored("step-00000004.a1"), right[4])
    seen["names"] = run.names()
    writer.close()

    shards = [run.sub(f"step-{step:08d}.a1") for step in (2, 3, 4)]
    first(lambda: shards[0].remove("shard-00001.distcp"))
    first(lambda: shards[1].replace("shard-00000.distcp", shards[1].read("shard-00000.distcp")[:-1]))
    first(lambda: shards[2].replace("shard-00001.distcp", flip(shards[2].read("shard-00001.distcp"))))
    erase(engine)
    heard = Heard()
    handler = RecoverHandler(Catalog(run), state, SyncWriter(Ranks()), heard, 2, {}, Ranks(), SavePolicy())
    seen["fell back"] = handler.load(), differing(snapshot(engine), right[1])
    seen["passed"] = heard.passed
    return seen


@pytest.fixture(scope="module")
def run(server: S3Server) -> Storage:
    return storage_at(f"s3://runs/{uuid4().hex}", server.options)


@pytest.fixture(scope="module")
def saved(server: S3Server, run: Storage) -> list[dict[str, Any]]:
    with Switch(server) as switch:
        return run_ranks(save_and_load, 2, run, switch)


def test_what_was_saved_is_loaded_bit_for_bit(saved: list[dict[str, Any]]) -> None:
    for seen in saved:
        assert [seen[f"step {step}"] for step in (1, 2, 3, 4)] == [[], [], [], []]


def test_a_save_fails_on_all_ranks_while_the_server_is_down(saved: list[dict[str, Any]]) -> None:
    for seen in saved:
        for outcome in seen["down"]:
            assert (outcome.error, outcome.ranks) == ("RankError", (0,))
            assert "rank 0: OSError: s3://" in outcome.text
            assert "NETWORK_CONNECTION" in outcome.text


def test_saves_work_again_when_the_server_does(saved: list[dict[str, Any]]) -> None:
    for seen in saved:
        assert seen["up"] == [FINE, FINE]
        assert seen["saved when up"] == [[], []]
        assert seen["older when up"] == []
        assert "never" not in seen["names"]


def test_damaged_checkpoints_are_passed_over(saved: list[dict[str, Any]]) -> None:
    assert [seen["fell back"] for seen in saved] == [("step-00000001.a1", [])] * 2
    (four, flipped), (three, cut), (two, missing) = saved[0]["passed"]
    assert (four, three, two) == ("step-00000004.a1", "step-00000003.a1", "step-00000002.a1")
    assert "CheckpointDamaged: shard-00001.distcp: the checksum" in flipped
    assert cut.startswith("shard-00000.distcp: ")
    assert "should be" in cut
    assert "shard-00001.distcp: missing" in missing
    assert saved[1]["passed"] == []


def test_one_process_loads_what_two_ranks_have_saved(run: Storage, saved: list[dict[str, Any]]) -> None:
    stored = StoredState(run.sub("step-00000001.a1"))
    box = Box(
        **{
            name.removeprefix("engine."): torch.zeros(stored.shape(name), dtype=stored.dtype(name))
            for name in stored.names
        }
    )
    load(run.sub("step-00000001.a1"), {"engine": box}, Ranks())
    save(run.sub("alone"), {"engine": box}, {}, Ranks())
    assert checkpoints.digest(run.sub("alone")) == checkpoints.digest(run.sub("step-00000001.a1"))

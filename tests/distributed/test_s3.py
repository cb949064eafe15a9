"""Runs in object storage, on a real S3 server that refuses, is busy, loses answers and is stopped."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import UnsupportedOperation
from multiprocessing.connection import Client, Listener
from typing import Any
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

from areal_ray import ckpt, cli, logs, storage_s3
from areal_ray.checkpoint import AsyncWriter, Catalog, CheckpointDamaged, SyncWriter, load, save
from areal_ray.checkpoint.lease import reading
from areal_ray.checkpoint.reader import StoredState
from areal_ray.checkpoint.retention import remove
from areal_ray.logs import ObjectLog
from areal_ray.ranks import RankError, Ranks
from areal_ray.recover import Dump, RecoverHandler, SavePolicy
from areal_ray.rundir import RunDir
from areal_ray.storage import Storage, storage_at
from tests.distributed.ranks import run_ranks
from tests.distributed.small import FINE, attempt, differing, erase, snapshot, start_engine, train
from tests.s3_proxy import S3Proxy
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.unit.boxes import Box, weights

pytestmark = pytest.mark.distributed

# What an operation on a server that is down says: that it is, and not that nothing is there.
DOWN = "NETWORK_CONNECTION|Could not connect to the endpoint"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
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
    monkeypatch.setattr(storage_s3, "_ATTEMPTS", 1)


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server and its keys as variables."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.environment


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


# Files


def test_a_directory_says_what_is_directly_in_it(storage: Storage) -> None:
    for name in ("b", "a", ".c"):
        write(storage, name, name.encode() * 3)
    write(storage.sub("d"), "deep", b"12345")
    assert storage.names() == [".c", "a", "b", "d"]
    assert storage.sizes() == {".c": 6, "a": 3, "b": 3}
    assert (storage.size("a"), storage.size("d/deep")) == (3, 5)
    assert (storage.size("d"), storage.size("nothing")) == (None, None)
    assert (storage.sub("nothing").names(), storage.sub("nothing").sizes()) == ([], {})


def test_a_directory_below_has_its_own_names(storage: Storage, uri: str) -> None:
    write(storage.sub("a/b"), "c", b"deep")
    assert storage.sub("a").sub("b").location == storage.sub("a/b").location == f"{uri}/a/b"
    assert storage.sub("a").names() == ["b"]
    assert storage.read("a/b/c") == b"deep"


def test_the_recipe_opens_the_same_directory_anew(storage: Storage) -> None:
    write(storage.sub("a"), "b", b"1")
    assert storage_at(**storage.sub("a").recipe).read("b") == b"1"


def test_make_wants_an_unused_directory(storage: Storage) -> None:
    storage.make()
    write(storage, "a", b"")
    with pytest.raises(FileExistsError, match=storage.location):
        storage.make()
    storage.ensure()  # which is content


def test_a_created_file_holds_what_was_written(storage: Storage) -> None:
    with storage.create("a") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
    assert storage.read("a") == b"one two"


def test_create_is_exclusive(storage: Storage) -> None:
    write(storage, "a", b"first")
    with pytest.raises(FileExistsError, match="/a exists"):
        write(storage, "a", b"second")
    assert storage.read("a") == b"first"


def test_a_name_is_not_there_before_all_of_it_is(storage: Storage) -> None:
    with storage.create("a") as file:
        file.write(b"1")
        assert storage.names() == []
    assert storage.names() == ["a"]


def test_replace_puts_new_content_in_the_place_of_the_old(storage: Storage) -> None:
    storage.replace("a", b"old, and longer")
    storage.replace("a", b"new")
    assert storage.read("a") == b"new"


def test_of_two_that_publish_the_first_stays(storage: Storage) -> None:
    storage.publish("a", b"first")
    with pytest.raises(FileExistsError, match="/a exists"):
        storage.publish("a", b"second")
    assert storage.read("a") == b"first"


def test_publishing_the_same_again_is_no_error(storage: Storage) -> None:
    storage.publish("a", b"same")
    storage.publish("a", b"same")
    assert storage.read("a") == b"same"


def test_an_open_file_can_be_sought_in(storage: Storage) -> None:
    write(storage, "a", b"0123456789")
    with storage.open("a") as file:
        file.seek(4)
        assert file.read(3) == b"456"
        file.seek(-2, 2)
        assert file.read() == b"89"


def test_what_is_not_there_cannot_be_read_or_removed(storage: Storage) -> None:
    for work in (storage.read, storage.open, storage.remove):
        with pytest.raises(FileNotFoundError):
            work("nothing")


def test_what_is_removed_is_gone_and_nothing_else(storage: Storage) -> None:
    write(storage, "a", b"1")
    write(storage, "b", b"2")
    storage.remove("a")
    assert storage.names() == ["b"]


def test_a_deleted_directory_is_gone_and_its_neighbour_is_not(storage: Storage) -> None:
    for name in ("d", "d/e", "d2"):
        write(storage.sub(name), "a", b"1")
    storage.sub("d").delete()
    assert storage.names() == ["d2"]
    assert storage.sub("d2").names() == ["a"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/../../x", "a//b", "a/./b", "a/"])
def test_a_name_that_leads_out_is_refused(storage: Storage, name: str) -> None:
    works: list[Callable[[str], Any]] = [storage.read, storage.open, storage.size, storage.sub, storage.remove]
    works += [
        lambda name: storage.replace(name, b""),
        lambda name: storage.publish(name, b""),
        lambda name: write(storage, name, b""),
    ]
    for work in works:
        with pytest.raises(ValueError, match="is not a name inside"):
            work(name)


def test_objects_cannot_be_appended_to(storage: Storage) -> None:
    assert not storage.can_append
    with pytest.raises(UnsupportedOperation, match="cannot be appended to"):
        storage.append("a", b"1")


def test_a_file_larger_than_what_may_be_under_way_arrives_whole(storage: Storage) -> None:
    pieces = [bytes([i]) * (1 << 20) for i in range(70)]
    with storage.create("large") as file:
        for piece in pieces:
            file.write(piece)
    assert storage.size("large") == 70 << 20
    assert hashlib.sha256(storage.read("large")).digest() == hashlib.sha256(b"".join(pieces)).digest()


def test_what_is_under_way_is_bounded() -> None:
    flushed: list[int] = []

    class Stream:
        written = 0

        def write(self, data: bytes) -> None:
            self.written += len(data)

        def flush(self) -> None:
            flushed.append(self.written)

    upload = storage_s3._Upload(Stream())
    for _ in range(20):
        upload.write(bytes(8 << 20))
    assert flushed == [64 << 20, 128 << 20]


# Credentials


@pytest.mark.parametrize(
    "uri",
    [
        "s3://me:hidden@runs/run",
        "s3://runs/run?secret_key=hidden",
        "s3://me:hidden@runs/run?region=here",
    ],
)
def test_credentials_and_options_in_a_path_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError, match="given apart from it") as caught:
        storage_at(uri, {})
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3://runs/../run", "s3://runs//run"])
def test_a_path_that_is_no_place_in_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="is not a name inside a bucket"):
        storage_at(uri, {})


@pytest.mark.parametrize(
    ("wrong", "codes"),
    [
        ({"secret_key": "hidden"}, "ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch"),
        ({"access_key": "hidden"}, "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_refused_with_what_the_server_said_and_no_key(
    server: S3Server, uri: str, wrong: dict[str, str], codes: str
) -> None:
    storage = storage_at(uri, {**server.options, **wrong})
    works: list[Callable[[], Any]] = [
        storage.names,
        storage.make,
        lambda: storage.read("a"),
        lambda: storage.size("a"),
        lambda: storage.replace("a", b""),
        lambda: storage.publish("a", b""),
        lambda: storage.remove("a"),
        lambda: write(storage, "a", b""),
    ]
    for work in works:
        with pytest.raises(PermissionError, match=codes) as caught:
            work()
        assert storage.location in str(caught.value)
        for secret in (ACCESS_KEY, SECRET_KEY, "hidden"):
            assert secret not in str(caught.value)


def test_a_key_that_the_server_repeats_is_masked(storage: Storage) -> None:
    assert isinstance(storage, storage_s3.S3Storage)
    text = f"AWS Error ACCESS_DENIED during PutObject operation: {ACCESS_KEY} may not,\n{SECRET_KEY} or not"
    shown = r"ACCESS_DENIED \(PutObject\): \*\*\* may not, \*\*\* or not$"
    with pytest.raises(PermissionError, match=shown), storage._plain_errors():
        raise OSError(text)


def test_what_is_refused_is_not_tried_again(proxy: S3Proxy, proxied: Storage) -> None:
    refused = storage_at(proxied.location, {**proxied.recipe["s3"], "secret_key": "hidden"})
    for work in (refused.names, lambda: refused.publish("a", b"")):
        proxy.methods.clear()
        with pytest.raises(PermissionError):
            work()
        assert len(proxy.methods) == 1


def test_the_environment_is_enough(environment: dict[str, str], uri: str) -> None:
    write(storage_at(uri), "a", b"1")
    storage_at(uri, {"endpoint": None, "access_key": None}).publish("b", b"2")
    assert storage_at(uri).names() == ["a", "b"]


def test_options_win_over_the_environment(
    server: S3Server, uri: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment:
        monkeypatch.setenv(name, "http://127.0.0.1:9" if "URL" in name else "wrong")
    write(storage_at(uri, server.options), "a", b"1")
    storage_at(uri, server.options).publish("b", b"2")
    assert storage_at(uri, server.options).names() == ["a", "b"]


def test_keys_come_as_a_set(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the environment's keys")
    both = {"access_key": "mine", "secret_key": "mine too"}
    assert storage_s3.with_environment(both) == {
        "endpoint": environment["AWS_ENDPOINT_URL"],
        "region": "us-east-1",
        **both,
    }
    assert storage_s3.with_environment({"region": "here"}) == {
        "endpoint": environment["AWS_ENDPOINT_URL"],
        "region": "here",
        "access_key": ACCESS_KEY,
        "secret_key": SECRET_KEY,
        "session_token": "of the environment's keys",
    }


# A network between


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


# Logs


def test_events_of_two_processes_are_merged_by_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 100))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    driver, worker = RunDir(storage), RunDir(storage)
    for n, run in enumerate((driver, worker, worker, driver, worker)):
        run.event("one" if run is driver else "two", n=n)
    assert len(storage.sub("events").names()) == 2
    for run in (driver, worker, RunDir(storage)):
        assert [event["n"] for event in run.events()] == [0, 1, 2, 3, 4]
    assert [event["n"] for event in driver.events("two")] == [1, 2, 4]


def test_metrics_written_in_the_background_are_there_after_flush(storage: Storage) -> None:
    run = RunDir(storage)
    for step in range(50):
        run.log_metrics(step, {"loss": 1.0 / (step + 1)})
    run.flush()
    assert RunDir(storage).metrics() == [{"step": step, "loss": 1.0 / (step + 1)} for step in range(50)]
    assert len(storage.sub("metrics").names()) == 1


def test_after_restarts_each_step_stands_once(storage: Storage) -> None:
    for first, end in ((0, 6), (3, 9), (5, 8), (0, 4)):
        run = RunDir(storage)
        run.rewind(first - 1, 0)
        for step in range(first, end):
            run.log_metrics(step, {"by": end})
        run.flush()
        steps = [line["step"] for line in run.metrics()]
        assert steps == list(range(end))
    assert {line["by"] for line in run.metrics()} == {4}
    assert len(storage.sub("metrics").names()) == 1  # what nothing is left of is removed


def test_a_line_that_the_server_was_down_for_goes_with_the_next(impatient: None, server: S3Server, uri: str) -> None:
    run = RunDir(storage_at(uri, server.options))
    run.event("before")
    run.log_metrics(1, {})
    run.flush()
    with outage(server):
        with pytest.raises(OSError, match=DOWN):
            run.event("during")
        run.log_metrics(2, {})
        with pytest.raises(OSError, match=DOWN):
            run.flush()
    run.event("after")
    run.log_metrics(3, {})
    run.flush()
    assert [event["event"] for event in run.events()] == ["before", "during", "after"]
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]


def test_a_long_log_goes_on_in_another_object(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PART_BYTES", 150)
    run = RunDir(storage)
    for n in range(10):
        run.event("numbered", n=n)
    assert len(storage.sub("events").names()) > 2
    assert max(storage.sub("events").sizes().values()) < 250
    assert [event["n"] for event in run.events()] == list(range(10))


# Checkpoints


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

    def saved(self, dump: Dump, blocked_s: float, waited_s: float, total_s: float) -> None: ...

    def skipped(self, step: int) -> None: ...

    def passed_over(self, checkpoint: str, reason: str) -> None:
        self.passed.append((checkpoint, reason))


def flip(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def save_and_load(rank: int, recipe: dict[str, Any], switch: tuple[str, int]) -> dict[str, Any]:
    """Saves at once and beside the training, damage, and a server that is away for a while."""
    storage_s3._ATTEMPTS = 1
    run = storage_at(**recipe)
    engine = start_engine()
    state, seen = {"engine": engine.state}, {}
    writer = AsyncWriter(Ranks(), Ranks(dist.new_group(backend="gloo")))
    engine.before_update = writer.fence

    def restored(name: str) -> dict[str, Any]:
        erase(engine)
        load(run.sub(name), state, Ranks())
        return snapshot(engine)

    def first(work: Callable[[], Any]) -> None:
        if rank == 0:
            work()
        dist.barrier()

    # Each in the state after another step.
    train(engine, seed=0)
    right = {1: snapshot(engine)}
    save(run.sub("step-00000001.a1"), state, {"step": 1, "attempt": 1}, Ranks())
    for step in (2, 3, 4):
        train(engine, seed=step)
        right[step] = snapshot(engine)
        begun = writer.begin(run.sub(f"step-{step:08d}.a1"), state, {"step": step, "attempt": 1})
    train(engine, seed=5)
    begun.result(60)
    for step, what in right.items():
        seen[f"step {step}"] = differing(restored(f"step-{step:08d}.a1"), what)

    def outage() -> tuple[Any, Any]:
        """What becomes of a save of either kind; training goes on in between."""
        at_once = attempt(lambda: save(run.sub("never"), state, {}, Ranks()))
        train(engine, seed=6)
        return at_once, attempt(lambda: writer.begin(run.sub("never"), state, {}).result(60))

    train(engine, seed=5)
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
        return run_ranks(save_and_load, 2, run.recipe, switch)


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
    assert ckpt.digest(run.sub("alone")) == ckpt.digest(run.sub("step-00000001.a1"))


# Readers and tools


def save_box(run: Storage, step: int, attempt: int = 1, value: float = 1.0) -> Storage:
    directory = run.sub(Catalog.name(step, attempt))
    save(directory, {"box": Box(**weights(value))}, {"step": step, "attempt": attempt}, Ranks())
    return directory


def test_two_saves_under_one_name_leave_the_first(storage: Storage) -> None:
    directory = save_box(storage, 1)
    with pytest.raises(RankError, match="FileExistsError"):
        save_box(storage, 1, value=2.0)
    assert ckpt.check(directory) > 0


def test_a_checkpoint_that_is_read_is_not_touched(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_box(storage, 1)
    with reading(directory):
        with monkeypatch.context() as patch:
            patch.delattr(storage_s3.S3Storage, "remove")
            assert not remove(Catalog(storage), "step-00000001.a1")
        assert ckpt.check(directory) > 0
    assert remove(Catalog(storage), "step-00000001.a1")
    assert storage.names() == []


def test_a_reader_who_comes_while_it_is_deleted_keeps_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_box(storage, 1)
    readers = []
    plain = storage_s3.S3Storage.remove

    def remove_late(self: storage_s3.S3Storage, name: str) -> None:
        if name == "manifest.json":
            readers.append(reading(directory))
            readers[0].__enter__()
        plain(self, name)

    monkeypatch.setattr(storage_s3.S3Storage, "remove", remove_late)
    assert not remove(Catalog(storage), "step-00000001.a1")
    readers[0].__exit__(None, None, None)
    assert ckpt.check(directory) > 0
    assert not [name for name in directory.names() if name.startswith(".reading")]


@pytest.fixture
def tool(environment: dict[str, str], capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """`areal-ray ckpt` with keys from the environment: exit status and what it printed."""
    broken_pipe = signal.getsignal(signal.SIGPIPE)

    def tool(*arguments: str) -> tuple[int, str]:
        status = cli.main(["ckpt", *arguments])
        printed = capfd.readouterr()
        return status, printed.out if status == 0 or printed.out else printed.err

    yield tool
    signal.signal(signal.SIGPIPE, broken_pipe)  # the command's own is to end silently


def test_ls_lists_what_is_good_and_what_is_not(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 1)
    save_box(storage, 2).remove("shard-00000.distcp")
    write(storage.sub("step-00000003.a1"), "shard-00000.distcp", b"cut")
    status, text = tool("ls", uri, "--json")
    assert status == 0
    good, damaged, unfinished = json.loads(text)
    assert (good["name"], good["state"], good["bytes"] > 0) == ("step-00000001.a1", "good", True)
    assert "shard-00000.distcp: missing" in damaged["state"]
    assert "never finished" in unfinished["state"]


def test_ls_of_nothing_and_of_a_server_that_is_down_are_told_apart(
    impatient: None, uri: str, tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = tool("ls", uri)
    assert (status, "nothing there" in text) == (1, True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # of the discard protocol, which nobody serves
    status, text = tool("ls", uri)
    assert (status, "nothing there" in text, "NETWORK_CONNECTION" in text) == (1, False, True)


def test_inspect_says_what_is_in_a_checkpoint(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 7)
    status, text = tool("inspect", f"{uri}/step-00000007.a1", "--json")
    assert status == 0
    assert json.loads(text)["info"]["step"] == 7
    assert json.loads(text)["tensors"]["box.weight"] == ["float32", [3, 4]]


def test_verify_reads_every_byte(storage: Storage, uri: str, tool: Any) -> None:
    directory = save_box(storage, 1)
    assert tool("verify", directory.location)[0] == 0
    directory.replace("shard-00000.distcp", flip(directory.read("shard-00000.distcp")))
    status, text = tool("verify", f"{uri}/step-00000001.a1")
    assert (status, text) == (1, "areal-ray ckpt: shard-00000.distcp: the checksum does not match\n")
    with pytest.raises(CheckpointDamaged):
        ckpt.check(directory)


def test_digest_and_diff_compare_states(storage: Storage, tool: Any) -> None:
    one, same, other = save_box(storage, 1), save_box(storage, 2), save_box(storage, 3, value=1.5)
    digests = [tool("digest", directory.location)[1] for directory in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert tool("diff", one.location, same.location) == (0, "bit-identical\n")
    status, text = tool("diff", one.location, other.location)
    assert (status, "box.weight: 12 of 12 elements, max |a-b| 0.5" in text) == (1, True)


def test_gc_deletes_what_was_never_finished(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 1)
    write(storage.sub("step-00000002.a1"), "shard-00000.distcp", b"cut")
    save_box(storage, 2, attempt=2)
    write(storage.sub("step-00000003.a2"), "shard-00000.distcp", b"may be under way")
    assert tool("gc", uri) == (0, "deleted step-00000002.a1\n")
    assert storage.names() == ["step-00000001.a1", "step-00000002.a2", "step-00000003.a2"]
    assert tool("gc", uri) == (0, "nothing to delete\n")


def test_repair_makes_rays_list_anew(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 1)
    save_box(storage, 2).remove("shard-00000.distcp")
    save_box(storage, 3)
    assert tool("repair", uri) == (0, "2 checkpoints: step-00000001.a1, step-00000003.a1\n")
    listed = json.loads(storage.read("checkpoint_manager_snapshot.json"))["checkpoint_results"]
    assert [result["checkpoint_dir_name"] for result in listed] == ["step-00000001.a1", "step-00000003.a1"]


def test_a_reader_sees_all_of_the_old_bytes_or_all_of_the_new_ones(
    storage: Storage, proxy: S3Proxy, proxied: Storage
) -> None:
    storage.replace("a", b"old")
    path = storage.location.removeprefix("s3://") + "/a"
    proxy.before = {f"GET /{path}": lambda: storage.replace("a", b"new, and longer")}
    assert proxied.read("a") in (b"old", b"new, and longer")


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_a_token_that_has_expired_is_a_permission_error_and_says_where(
    proxy: S3Proxy, proxied: Storage, code: str
) -> None:
    proxy.code = code
    for work in (proxied.names, lambda: proxied.replace("a", b""), lambda: proxied.publish("a", b"")):
        with pytest.raises(PermissionError, match=code) as caught:
            work()
        assert proxied.location in str(caught.value)


def test_a_secret_with_a_slash_is_not_shown() -> None:
    with pytest.raises(ValueError, match="given apart") as caught:
        storage_at("s3://me:hid/den@runs/run", {})
    assert "hid/den" not in str(caught.value)


def test_a_bucket_has_a_name() -> None:
    with pytest.raises(ValueError, match="must be s3://bucket/prefix"):
        storage_at("s3:///run", {})


def test_what_was_cut_off_while_it_was_written_is_not_there(storage: Storage) -> None:
    def write_half() -> None:
        with storage.create("a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert storage.names() == []


def test_steps_taken_back_do_not_return_with_the_next_line(storage: Storage) -> None:
    log = ObjectLog(storage.sub("metrics"), at_once=True)
    for step in (0, 10, 20, 30):
        log.append({"step": step})
    log.keep(lambda line: line["step"] <= 20)
    log.append({"step": 30})
    assert [line["step"] for line in log.lines()] == [0, 10, 20, 30]


def test_a_file_deleted_while_it_is_open_is_not_found(storage: Storage) -> None:
    write(storage, "a", b"0123456789")
    with storage.open("a") as file:
        storage.remove("a")
        with pytest.raises(FileNotFoundError):
            file.read()

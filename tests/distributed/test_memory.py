"""Copies in memory: whenever a rank is killed, those who come after it have the same one, or none."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from areal_ray.checkpoint import Catalog, MemoryCopies, SyncWriter, memory_copies
from areal_ray.checkpoint.shard_file import ShardImage
from areal_ray.distributed import RankError, Ranks
from areal_ray.processes import memory_keeper
from areal_ray.processes.launch import address
from areal_ray.storage import LocalStorage
from areal_ray.train.recovery import RecoverHandler, SavePolicy
from tests.distributed.killed_run import Numbers
from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed

INFO = {"config": {"lr": 0.1}}
LAST = 4  # step whose copy is cut off


@pytest.fixture
def name() -> Iterator[str]:
    """Of a run; what its ranks have left behind is let go."""
    name = secrets.token_hex(8)
    yield name
    for rank in range(2):
        for file in memory_keeper.claim(f"{name}-{rank}"):
            os.close(file)


class Told:
    """A count that only rank 0 has right, as some of what is saved."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Attempt:
    """The ranks of one start, in each of them what is trained and its copies."""

    def __init__(self, name: str, parent: int, durable: Callable[[], None] = lambda: None) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.ranks, self.numbers, self.told, self.said = Ranks(), Numbers(), Told(), []
        self.copies = MemoryCopies(name, self.ranks, parent, self.said.append, durable)

    @property
    def state(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "told": self.told}

    def step(self) -> None:
        self.numbers.train()
        self.told.value = self.numbers.step if self.ranks.rank == 0 else -1
        self.copies.take((1, self.numbers.step), self.state, INFO)

    def restore(
        self, info: dict[str, Any] = INFO, newer_than: tuple[int, int] | None = None, attempt: int = 1
    ) -> dict[str, Any]:
        copy = self.copies.restore(self.state, info, attempt, newer_than)
        found = {"step": self.numbers.step, "bits": self.numbers.bits(), "told": self.told.value, "said": self.said}
        return {**found, "copy": copy and (copy.version, copy.values, copy.info)}


def after(rank: int, name: str, parent: int, *options: Any) -> dict[str, Any]:
    return Attempt(name, parent).restore(*options)


def bits_at(step: int) -> str:
    """Of what is trained; a function of the step and the number of ranks. A collective."""
    numbers = Numbers()
    for _ in range(step):
        numbers.train()
    return numbers.bits()


def at_each_step(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    return [bits_at(step) for step in range(LAST + 1)]


@pytest.fixture(scope="module")
def bits() -> list[str]:
    """What two ranks are to have after each step."""
    return run_ranks(at_each_step, 2)[0]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def to_be_killed() -> None:
    threading.Event().wait()


def wait_for_the_other() -> None:
    dist.recv(torch.zeros(1), 0)


def half_a_copy(slot: ShardImage, tensors: list[torch.Tensor]) -> None:
    for kept, tensor in list(zip(slot.tensors, tensors, strict=True))[:3]:
        kept.copy_(tensor)
    wait_for_the_other()
    die()


def no_record(*_: Any) -> None:
    wait_for_the_other()
    die()


def half_a_record(file: int, data: bytes, at: int) -> None:
    os.write_at(file, data[: len(data) // 2], at)  # type: ignore[attr-defined]
    wait_for_the_other()
    die()


def whole_record(file: int, data: bytes, at: int) -> None:
    os.write_at(file, data, at)  # type: ignore[attr-defined]
    wait_for_the_other()
    die()


CUTS: dict[str, tuple[Any, str, Any]] = {
    "half of the tensors": (ShardImage, "fill", half_a_copy),
    "no record": (MemoryCopies, "_seal", no_record),
    "half a record": (memory_copies.os, "pwrite", half_a_record),
    "a whole record": (memory_copies.os, "pwrite", whole_record),
}


def cut_off(rank: int, name: str, parent: int, cut: str) -> None:
    """Rank 1 is killed at that point of its last copy, when rank 0 has its own whole."""
    attempt = Attempt(name, parent)
    for step in range(1, LAST + 1):
        if rank == 1 and step == LAST:
            attempt.copies._last.result()  # type: ignore[union-attr]
            where, what, instead = CUTS[cut]
            os.write_at = os.pwrite  # type: ignore[attr-defined]
            setattr(where, what, instead)
        attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    if rank == 0:
        dist.send(torch.zeros(1), 1)
    to_be_killed()


@pytest.mark.parametrize("cut", CUTS)
def test_whenever_a_rank_is_killed_all_go_on_from_the_same_copy(name: str, bits: list[str], cut: str) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(cut_off, 2, name, os.getpid(), cut)
    step = LAST if cut == "a whole record" else LAST - 1
    for found in run_ranks(after, 2, name, os.getpid()):
        assert (found["step"], found["bits"], found["told"], found["said"]) == (step, bits[step], step, [])
        assert found["copy"] == ((1, step), {"numbers": {"step": step}, "told": {"value": step}}, INFO)


def killed(rank: int, name: str, parent: int, *not_durable: int) -> None:
    """All steps are copied, but for what is said of some on rank 1; then the ranks are killed."""
    steps = iter(range(1, LAST + 1))

    def durable() -> None:
        if next(steps) in not_durable and rank == 1:
            raise OSError("the disk is full")

    attempt = Attempt(name, parent, durable)
    for _ in range(LAST):
        attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    dist.barrier()
    if rank == 1:
        die()
    to_be_killed()


def leave(name: str, *not_durable: int, ranks: int = 2) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(killed, ranks, name, os.getpid(), *not_durable)


@pytest.mark.parametrize(("not_durable", "step"), [((4,), 3), ((3,), 4), ((3, 4), 2), ((2, 4), 3)])
def test_a_copy_that_does_not_count_on_one_rank_costs_no_other_one(
    name: str, bits: list[str], not_durable: Any, step: int
) -> None:
    leave(name, *not_durable)
    found = run_ranks(after, 2, name, os.getpid())
    assert [(each["step"], each["bits"]) for each in found] == [(step, bits[step])] * 2


def test_a_copy_comes_back_once(name: str) -> None:
    leave(name)
    assert [found["step"] for found in run_ranks(after, 2, name, os.getpid())] == [LAST] * 2
    assert [(found["step"], found["copy"]) for found in run_ranks(after, 2, name, os.getpid())] == [(0, None)] * 2


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ((INFO, (1, LAST - 1)), True),
        ((INFO, (1, LAST)), False),
        ((INFO, (2, 1)), False),
        (({"config": {"lr": 0.2}},), False),
        ((INFO, None, 2), False),
    ],
    ids=["newer than the checkpoint", "of the same step", "older", "of another configuration", "of an earlier attempt"],
)
def test_only_what_is_newer_and_of_the_same_run_is_used(name: str, options: Any, used: bool) -> None:
    leave(name)
    for found in run_ranks(after, 2, name, os.getpid(), *options):
        assert (found["step"], found["told"], found["said"]) == ((LAST, LAST, []) if used else (0, 0, []))


def test_another_number_of_ranks_goes_without(name: str) -> None:
    leave(name)
    (found,) = run_ranks(after, 1, name, os.getpid())
    assert (found["step"], found["copy"], found["said"]) == (0, None, [])


def flipped(rank: int, name: str, parent: int) -> dict[str, Any]:
    """A bit of rank 1's newest copy is another one."""
    attempt = Attempt(name, parent)
    claim = memory_copies.claim

    def damaged(name: str) -> list[int]:
        files = claim(name)
        for file in files if rank == 1 else ():
            byte = os.pread(file, 1, 1000)
            os.pwrite(file, bytes([byte[0] ^ 1]), 1000)
        return files

    memory_copies.claim = damaged
    return attempt.restore()


def test_damage_on_one_rank_is_found_by_all(name: str) -> None:
    leave(name)
    found = run_ranks(flipped, 2, name, os.getpid())
    assert [(each["step"], each["told"], each["copy"]) for each in found] == [(0, 0, None)] * 2
    (said,) = found[0]["said"]
    assert "rank 1: CheckpointDamaged: the copy in memory of step 4 does not match its checksum" in said
    assert found[1]["said"] == []


def forgets(rank: int, name: str, parent: int, ends: bool) -> None:
    attempt = Attempt(name, parent)
    attempt.step()
    attempt.step()
    if ends:
        attempt.copies.close()
    else:
        attempt.copies.forget()
    dist.barrier()
    if rank == 1:
        die()
    to_be_killed()


@pytest.mark.parametrize("ends", [False, True], ids=["state went back", "run came to its end"])
def test_nothing_comes_back_when(name: str, ends: bool) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(forgets, 2, name, os.getpid(), ends)
    assert [found["copy"] for found in run_ranks(after, 2, name, os.getpid())] == [None] * 2


def goes_back_and_on(rank: int, name: str, parent: int) -> dict[str, Any]:
    attempt = Attempt(name, parent)
    attempt.step()
    attempt.copies.forget()
    attempt.step()
    attempt.step()
    attempt.copies._last.result()  # type: ignore[union-attr]
    return {"sizes": [os.fstat(slot.fd).st_size for slot in attempt.copies._slots]}


def test_after_going_back_copies_are_taken_as_before(name: str) -> None:
    for found in run_ranks(goes_back_and_on, 2, name, os.getpid()):
        assert len(set(found["sizes"])) == 1  # both have a record
    assert [each["step"] for each in run_ranks(after, 2, name, os.getpid())] == [3] * 2


def without_room(rank: int, name: str, parent: int, what: str) -> tuple[list[str], list[int]]:
    """How many copies there are after each of some steps, with room on both ranks from the third on."""

    def free() -> tuple[float, float]:
        size = 2 * sum(tensor.nbytes for tensor in attempt.numbers.mine())
        return 1e6 + 1.5 * size, 1e7  # for one rank there would be

    def locked(*_: Any) -> None:
        raise RuntimeError("no more memory can be locked")

    attempt, room, staging = Attempt(name, parent), memory_copies._room, memory_copies.ShardImage
    memory_copies._AGAIN = 1
    if rank == 1 and what == "memory":
        memory_copies._room = free  # type: ignore[assignment]
    if rank == 1 and what == "locked memory":
        memory_copies.ShardImage = locked  # type: ignore[assignment,misc]
    counts = []
    for step in range(1, 5):
        if step == 3:
            memory_copies._room, memory_copies.ShardImage = room, staging  # type: ignore[misc]
        attempt.step()
        counts.append(len(attempt.copies._slots))
    return attempt.said, counts


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("memory", "they need 0.0 GB beside each of 2 ranks, and 0.0 GB are free on this node"),
        ("locked memory", "no more memory can be locked"),
    ],
)
def test_without_room_on_one_rank_there_are_no_copies_for_a_while(name: str, what: str, why: str) -> None:
    (quiet, counts), (said, also) = run_ranks(without_room, 2, name, os.getpid(), what)
    assert counts == also == [0, 0, 2, 2]
    assert (quiet, said) == ([], [f"no copies in memory for now: {why}"])
    assert [each["step"] for each in run_ranks(after, 2, name, os.getpid())] == [4] * 2


class Quiet:
    """A Journal: nobody hears it."""

    def saved(self, *_: Any) -> None: ...

    def skipped(self, step: int) -> None: ...

    def passed_over(self, checkpoint: str, reason: str) -> None: ...


def recovers(rank: int, name: str, parent: int, root: str, number: int) -> dict[str, Any]:
    """A run with both, checkpoints and copies: what is there after each of its moves."""
    attempt, catalog = Attempt(name, parent), Catalog(LocalStorage(root))
    saves, policy = SyncWriter(attempt.ranks), SavePolicy()
    recover = RecoverHandler(
        catalog, attempt.state, saves, Quiet(), number, INFO, attempt.ranks, policy, attempt.copies
    )
    if number == 2:
        copy = recover.restore_from_memory()
        return {"recalled": copy and copy.version}

    def copies() -> list[int]:
        if attempt.copies._last is not None:
            attempt.copies._last.result()
        records = [memory_copies._record(slot.fd, slot.size) for slot in attempt.copies._slots]
        return sorted(record["place"][1] for record in records if record)

    seen: dict[str, Any] = {"nothing to go back to": recover.load()}
    attempt.numbers.train()
    recover.save_to_memory(1)
    seen["one"] = copies()
    seen["kept, as nothing was loaded"] = recover.load(), copies()
    attempt.numbers.train()
    recover.save(2, {})
    attempt.numbers.train()
    recover.save_to_memory(3)
    seen["two"] = copies()
    seen["gone with going back"] = recover.load(), attempt.numbers.step, copies()
    attempt.numbers.train()
    recover.save_to_memory(3)
    seen["anew"] = copies()
    recover._catalog = Catalog(LocalStorage(f"{root}/file"))
    recover.save(4, {})
    with pytest.raises(RankError):
        recover.finish()
    seen["still, as the last save has failed"] = copies()
    return seen


def test_copies_stay_as_long_as_they_are_good_for_something(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    for seen in run_ranks(recovers, 2, name, os.getpid(), str(tmp_path / "run"), 1):
        assert seen == {
            "nothing to go back to": None,
            "one": [1],
            "kept, as nothing was loaded": (None, [1]),
            "two": [1, 3],
            "gone with going back": ("step-00000002.a1", 2, []),
            "anew": [3],
            "still, as the last save has failed": [3],
        }
    for seen in run_ranks(recovers, 2, name, os.getpid(), str(tmp_path / "run"), 2):
        assert seen["recalled"] == (1, 3)


KEEPS = """
import os, signal, sys
from areal_ray.processes.memory_keeper import MemoryKeeper
files = [os.memfd_create("kept") for _ in range(2)]
for number, file in enumerate(files):
    os.write(file, b"content %d" % number)
kept = MemoryKeeper(sys.argv[1], files, int(sys.argv[2]))
print("ready", flush=True)
if sys.stdin.readline() == "release\\n":
    kept.release()
    print("released", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def keeps(name: str) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a process that has two files kept until its standard input says that it is to die."""
    started = []

    def start(owner: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPS, f"{name}-0", str(owner)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_files_outlive_their_process(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    assert psutil.Process(process.pid).children() == []  # Ray ends the children of a worker
    process.stdin.close()
    process.wait()
    files = memory_keeper.claim(f"{name}-0")
    assert [os.pread(file, 20, 0) for file in files] == [b"content 0", b"content 1"]
    for file in files:
        os.close(file)
    assert memory_keeper.claim(f"{name}-0") == []


def test_a_process_that_lives_keeps_its_files(name: str, keeps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps(os.getpid())
    monkeypatch.setattr(memory_keeper, "_CLAIM_S", 0.1)
    assert memory_keeper.claim(f"{name}-0") == []


def is_over(name: str) -> None:
    """Wait until the process that keeps the files has ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address(f"{name}-0"))
        except ConnectionRefusedError:
            return
        connection.settimeout(60)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            return


def test_what_is_released_is_gone(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    process.stdin.write("release\n")
    process.stdin.flush()
    assert process.stdout.readline() == "released\n"
    is_over(name)
    process.stdin.close()
    process.wait()
    assert memory_keeper.claim(f"{name}-0") == []


@pytest.mark.parametrize("when", ["while its process lives", "afterwards"])
def test_it_ends_with_its_owner(name: str, keeps: Any, when: str) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        process = keeps(owner.pid)
        if when == "afterwards":
            process.stdin.close()
            process.wait()
        owner.kill()
    is_over(name)


def test_it_does_not_start_without_its_owner(name: str) -> None:
    with subprocess.Popen(["true"]) as owner:
        owner.wait()
    with open(os.devnull) as file, pytest.raises(OSError, match="did not start"):
        memory_keeper.MemoryKeeper(f"{name}-0", [file.fileno()], owner.pid)


def test_a_process_that_its_process_has_forked_hides_no_death(name: str, keeps: Any) -> None:
    process = keeps(os.getpid())
    with open(f"/proc/{process.pid}/fd/{pipe_of(process.pid)}", "wb"):  # as a fork would have it
        process.kill()
        process.wait()
        files = memory_keeper.claim(f"{name}-0")
    assert len(files) == 2
    for file in files:
        os.close(file)


def pipe_of(pid: int) -> int:
    """The writing end that a process has of a pipe, beside its standard streams."""
    (found,) = (
        int(entry.name)
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if int(entry.name) > 2 and os.readlink(entry).startswith("pipe:")
    )
    return found


def test_there_is_one_of_a_name(name: str, keeps: Any) -> None:
    keeps(os.getpid())
    with open(os.devnull) as file, pytest.raises(OSError, match="in use"):
        memory_keeper.MemoryKeeper(f"{name}-0", [file.fileno()], os.getpid())


def test_nothing_is_left_in_a_directory(name: str, keeps: Any) -> None:
    before = set(os.listdir("/dev/shm"))
    keeps(os.getpid())
    deadline = time.monotonic() + 30  # what others open and unlink there meanwhile is gone by then
    while (left := set(os.listdir("/dev/shm")) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()
    assert not Path(address(f"{name}-0")[1:]).exists()

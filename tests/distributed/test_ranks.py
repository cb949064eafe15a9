"""The harness of this tier: results by rank, failures told, nobody left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.distributed.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


def look_around(rank: int, greeting: str) -> tuple[int, str, list[str]]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    return rank, greeting, [os.environ[name] for name in names]


def one_raises(rank: int, fifo: str) -> None:
    """Rank 0 says who it is and waits for ever; rank 1 listens, then raises."""
    if rank == 0:
        Path(fifo).write_text(str(os.getpid()))
        signal.pause()
    raise LookupError(f"the other one is {Path(fifo).read_text()}.")


def one_dies(rank: int) -> None:
    os._exit(7) if rank == 1 else signal.pause()


def hash_of_a_name(rank: int) -> int:
    return hash("lm_head.weight")


def needs_rank_0(rank: int) -> bytes:
    """Rank 0 has the store, and is done at once."""
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        time.sleep(0.3)
        store.set("word", "late")
        return bytes(store.get("word"))
    return b""


def wait_for_ever(rank: int) -> None:
    signal.pause()


def test_results_come_by_rank_from_the_environment_of_a_launcher() -> None:
    for rank, result in enumerate(run_ranks(look_around, 2, "hello")):
        assert result == (rank, "hello", [str(rank), str(rank), "2", "1", "127.0.0.1", ""])


def test_no_order_of_names_in_a_set_is_the_same_by_chance() -> None:
    first, second = run_ranks(hash_of_a_name, 2)
    assert first != second


def test_a_rank_that_is_done_stays_for_the_others() -> None:
    assert run_ranks(needs_rank_0, 2) == [b"", b"late"]


def test_a_failure_carries_the_traceback_and_ends_the_others(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed:.*in one_raises.*LookupError: the other one is") as caught:
        run_ranks(one_raises, 2, str(tmp_path / "fifo"))
    other = int(str(caught.value).rpartition("the other one is ")[2].strip().rstrip("."))
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_a_death_is_told_with_its_exit_code() -> None:
    with pytest.raises(RankFailed, match="rank 1 died, exit code 7"):
        run_ranks(one_dies, 2)


def test_the_time_limit_names_who_is_late() -> None:
    with pytest.raises(RankFailed, match=r"ranks \[0\] were not done"):
        run_ranks(wait_for_ever, 1, time_limit_s=0.2)


def server_dies(rank: int, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    os.kill(os.getppid(), signal.SIGKILL)


def test_after_the_death_of_a_server_its_rank_ends_and_the_next_ones_have_another(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="a server of the ranks has ended"):
        run_ranks(server_dies, 1, str(tmp_path))
    (rank,) = map(int, os.listdir(tmp_path))
    deadline = time.monotonic() + 10
    while psutil.pid_exists(rank):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(set(run_ranks(hash_of_a_name, 2))) == 2

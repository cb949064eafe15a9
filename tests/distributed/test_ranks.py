"""The harness of this tier: results by rank, failures told, nobody left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

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


def wait_for_ever(rank: int) -> None:
    signal.pause()


def test_results_come_by_rank_from_the_environment_of_a_launcher() -> None:
    for rank, result in enumerate(run_ranks(look_around, 2, "hello")):
        assert result == (rank, "hello", [str(rank), str(rank), "2", "1", "127.0.0.1", ""])


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

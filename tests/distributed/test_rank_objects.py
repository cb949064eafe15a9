"""Objects between ranks: each goes where it is needed, and outcomes are a word unless somebody failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from areal_ray.distributed import RankError, Ranks
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def exchange(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    ranks, gathers = Ranks(), []
    gather = dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: (gathers.append(a), gather(*a, **k))
    seen: dict[str, Any] = {
        "gathered": ranks.gather_to_rank_zero(f"from {rank}"),
        "numbers": ranks.gather_numbers([rank, 2.0**53 - rank]),
        "scattered": ranks.scatter(["for 0", "for 1"] if rank == 0 else None),
        "own": ranks.all_or_raise(lambda: rank * 10),
        "of rank 0": ranks.on_rank_zero(lambda: {"rank": rank}),
        "opinion": ranks.agree(rank == 0),
        "gathers": len(gathers),
    }

    def fail_on_one() -> None:
        if rank == 1:
            raise FileNotFoundError("gone")

    for name, work in (("one failed", ranks.all_or_raise), ("rank 0 failed", ranks.on_rank_zero)):
        try:
            work(fail_on_one if name == "one failed" else lambda: 1 // rank)
        except RankError as error:
            seen[name] = (str(error), error.only(OSError), type(error.__cause__).__name__)
    return seen


def test_objects_go_where_they_are_needed_and_outcomes_are_a_word() -> None:
    zero, one = run_ranks(exchange, 2)
    assert (zero["gathered"], one["gathered"]) == (["from 0", "from 1"], None)
    assert (zero["numbers"], one["numbers"]) == ([[0.0, 2.0**53], [1.0, 2.0**53 - 1]], None)
    assert (zero["scattered"], one["scattered"]) == ("for 0", "for 1")
    assert (zero["own"], one["own"]) == (0, 10)
    for seen in (zero, one):
        assert (seen["of rank 0"], seen["opinion"], seen["gathers"]) == ({"rank": 0}, True, 0)
        assert seen["one failed"][:2] == ("rank 1: FileNotFoundError: gone", True)
        assert seen["rank 0 failed"][:2] == ("rank 0: ZeroDivisionError: integer division or modulo by zero", False)
    assert (zero["one failed"][2], one["one failed"][2]) == ("NoneType", "FileNotFoundError")

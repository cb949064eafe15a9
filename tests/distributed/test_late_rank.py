"""A collective that runs into its limit: the panel says how long was waited, for which rank, and what to try."""

import pytest

from areal_ray.cluster.failures import cause_of
from areal_ray.config import load
from areal_ray.driver.hints import hint
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

from . import late_rank
from .ranks import run_ranks

pytestmark = pytest.mark.distributed


class Failed(Exception):
    def __init__(self, errors):
        self.worker_failures = errors


def test_a_rank_that_is_late_is_named_with_what_to_try(tmp_path):
    error, _ = run_ranks(late_rank.run, 2)
    run = RunDir(LocalStorage(tmp_path))
    run.event("attempt", attempt=1, world_size=2)
    run.event("stuck", attempt=1, rank=1, waiting=False, where="mine.py:7 in f", seconds=9.0, phase="step")
    cause = cause_of(Failed({0: error}), run)
    assert "Timed out waiting 1000ms" in cause.message
    assert cause.infrastructure  # so that it is tried again, and not held against the code
    told = hint(cause, load("conf/experiments/tiny.yaml", ["cluster.collective_timeout_s=77"]), run)
    assert "a rank waited 77 s for the others; their watchdogs saw rank 1 (did not) at mine.py:7" in told
    assert "cluster.collective_timeout_s" in told

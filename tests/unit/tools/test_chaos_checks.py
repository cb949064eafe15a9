"""What the checker of `areal-ray chaos` finds in ledgers of runs that lost something."""

import json

import pytest

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.chaos.checks import restores

pytestmark = pytest.mark.unit

FIRST, SECOND, OTHER = "step-00000010.a1", "step-00000020.a1", "step-00000010.a2"


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


def ledger(run, *events):
    for time, kind, checkpoint, *memory in events:
        line = {"time": time, "event": kind, "checkpoint": checkpoint, **({"memory": memory[0]} if memory else {})}
        run.storage.append("events.jsonl", json.dumps(line).encode() + b"\n")


def found(run, seen=(), damaged=()):
    committed, lost = restores(run, dict(seen), damaged)
    return committed.kept, lost.kept


def test_the_newest_committed_one_is_right(run):
    ledger(run, (1, "saved", FIRST), (2, "saved", SECOND), (3, "restored", SECOND), (4, "restored", SECOND))
    assert found(run) == (True, True)


def test_an_older_one_is_a_loss(run):
    ledger(run, (1, "saved", FIRST), (2, "saved", SECOND), (3, "restored", FIRST))
    assert found(run) == (True, False)


def test_unless_the_newer_one_was_damaged_on_purpose(run):
    ledger(run, (1, "saved", FIRST), (2, "saved", SECOND), (3, "restored", FIRST))
    assert found(run, damaged=[SECOND]) == (True, True)


def test_what_is_committed_later_is_no_loss_now(run):
    ledger(run, (1, "saved", FIRST), (2, "restored", FIRST), (3, "saved", SECOND))
    assert found(run) == (True, True)


def test_a_later_attempt_s_is_newer_whatever_the_step(run):
    ledger(run, (1, "saved", FIRST), (2, "saved", SECOND), (3, "saved", OTHER), (4, "restored", SECOND))
    assert found(run) == (True, False)


def test_what_was_never_committed_must_not_be_restored(run):
    ledger(run, (1, "saved", FIRST), (2, "restored", SECOND))
    assert found(run) == (False, True)


@pytest.mark.parametrize(("copy", "kept"), [(OTHER, True), (FIRST, False)])
def test_a_copy_in_memory_is_in_no_list_but_must_not_be_older(run, copy, kept):
    ledger(run, (1, "saved", FIRST), (2, "saved", SECOND), (3, "restored", None, copy))
    assert found(run) == (True, kept)


def test_a_commit_that_only_the_watcher_has_seen_counts(run):
    ledger(run, (1, "saved", FIRST), (3, "restored", SECOND))
    assert found(run, seen={SECOND: 2}) == (True, True)
    ledger(run, (4, "restored", FIRST))
    assert found(run, seen={SECOND: 2}) == (True, False)


def test_beginning_anew_is_a_loss_if_there_was_something(run):
    ledger(run, (1, "started", None), (2, "saved", FIRST))
    assert found(run) == (True, True)
    ledger(run, (3, "started", None))
    assert found(run) == (True, False)

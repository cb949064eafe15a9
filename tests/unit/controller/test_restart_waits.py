"""Failures of workers and of the controller in a row: waited between, and counted from one checkpoint to the next."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from areal_ray.checkpoint import Catalog
from areal_ray.cluster.requests import PlannedRestart
from tests.unit.checkpoint.boxes import save_box

from .controller_fakes import RAISE, RAPID_S, RESET, RETRY, decide, failed

pytestmark = pytest.mark.unit


class TestFailuresInQuickSuccession:
    @pytest.fixture
    def clock(self, clock):
        clock.step = 1.0
        return clock

    def test_they_are_waited_between_longer_and_longer(self, make, count, capsys):
        decide(make(), *[failed(ActorDiedError(), RESET)] * 10)
        assert count.held == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
        assert "3 failures without a new checkpoint: starting again in 1 s" in capsys.readouterr().out

    def test_a_new_checkpoint_ends_that(self, make, count, tmp_path):
        restarts = make()
        decide(restarts, *[failed(ActorDiedError(), RESET)] * 4)
        save_box(tmp_path)
        decide(restarts, failed(ActorDiedError(), RESET))
        assert count.held == [1.0, 2.0]
        decide(restarts, *[failed(ActorDiedError(), RESET)] * 2)
        assert count.held == [1.0, 2.0, 1.0, 2.0]

    def test_so_does_a_while_without(self, make, count, clock):
        restarts = make()
        decide(restarts, *[failed(ActorDiedError(), RESET)] * 4)
        clock.now += 2 * RAPID_S
        decide(restarts, *[failed(ActorDiedError(), RESET)] * 2)
        assert count.held == [1.0, 2.0]

    def test_leaving_on_request_is_not_waited_for(self, make, count):
        decide(make(), *[failed(PlannedRestart("resize"), RESET)] * 5)
        assert count.held == []

    def test_trouble_is_known_as_such_until_the_workers_have_saved(self, make):
        restarts, seen = make(), []
        for _ in range(4):
            decide(restarts, failed(ActorDiedError(), RESET))
            seen.append(restarts.troubled)
        assert seen == [False, False, True, True]
        decide(restarts, failed(PlannedRestart("resize"), RESET))
        assert not restarts.troubled

    def test_controller_troubles_are_waited_between_too(self, make, count):
        decide(make(), *[ControllerError(RuntimeError("init_process_group"))] * 4)
        assert count.held == [1.0, 2.0]


class TestTheControllerIsInTrouble:
    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), RuntimeError("init_process_group: timed out")], ids=str
    )
    def test_it_is_tried_again_up_to_a_limit(self, make, run, error):
        assert decide(make(max_failures=0, max_controller_failures=2), *[ControllerError(error)] * 3) == [
            RETRY,
            RETRY,
            RAISE,
        ]
        assert len(run.events("controller_trouble")) == 2
        assert str(error) in run.events("controller_trouble")[0]["error"]

    def test_a_new_checkpoint_gives_it_all_tries_again(self, make, tmp_path):
        restarts, trouble = make(max_controller_failures=2), ControllerError(RuntimeError("init_process_group"))
        assert decide(restarts, trouble, trouble) == [RETRY] * 2
        save_box(tmp_path)
        assert decide(restarts, trouble, trouble, trouble) == [RETRY, RETRY, RAISE]

    def test_workers_that_could_not_be_placed_are_said_and_fewer_are_tried(self, make, count, capsys):
        assert count.choose(2) == 2
        assert decide(make(), ControllerError(WorkerGroupStartupTimeoutError(2))) == [RETRY]
        assert "there was no room for 2 workers" in capsys.readouterr().out
        assert count.choose(2) == 1

    def test_storage_that_cannot_be_looked_at_decides_nothing(self, make, monkeypatch):
        def away(self):
            raise OSError(5, "Input/output error")

        restarts = make()
        monkeypatch.setattr(Catalog, "last_committed", away)
        assert decide(restarts, failed(ValueError("mine")), failed(KeyError("mine"))) == [RETRY] * 2

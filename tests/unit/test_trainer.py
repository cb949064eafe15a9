"""The controller that runs in place of Ray's."""

from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.controller import TrainController

from areal_ray.trainer import Controller

pytestmark = pytest.mark.unit


@pytest.fixture
def controller(monkeypatch):
    """A Controller whose list of checkpoints is written by `write`."""

    def make(write):
        def init(self, **options):
            self._checkpoint_manager = SimpleNamespace(_write_state_to_storage=write)

        monkeypatch.setattr(TrainController, "__init__", init)
        return Controller((None, None))

    return make


def test_a_list_of_checkpoints_that_cannot_be_written_is_said_and_stops_nobody(controller, capsys):
    def full():
        raise OSError(28, "No space left on device")

    controller(full)._checkpoint_manager._write_state_to_storage()
    assert "could not write Ray's list of checkpoints: [Errno 28] No space left on device" in capsys.readouterr().out


def test_it_is_written_when_it_can_be(controller):
    written = []
    controller(lambda: written.append(True))._checkpoint_manager._write_state_to_storage()
    assert written == [True]


def test_what_is_wrong_with_the_list_itself_is_raised(controller):
    def wrong():
        raise ValueError("not a list")

    with pytest.raises(ValueError, match="not a list"):
        controller(wrong)._checkpoint_manager._write_state_to_storage()

"""Lines for the user, as the driver shows them and as they are where Ray prints."""

import pytest

from areal_ray.cluster import console

pytestmark = pytest.mark.unit

UNNAMED = "[W1127 07:29:18.77 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3"


@pytest.fixture
def printed(capsys, monkeypatch):
    """Lines that a worker prints, with marks or without."""

    def printed(marks):
        monkeypatch.setattr(console._Marks, "on", True)
        if not marks:
            console.leave_out_marks()
        console.say("step 3")
        console.log("pages\nof stacks")
        console.say_end()
        return capsys.readouterr().out.splitlines()

    return printed


def test_marked_lines_are_shown_as_they_were_said_and_the_end_is_noticed(printed, capsys):
    lines = printed(marks=True)
    with console.Console() as shown:
        shown._show({"actor_name": "RayTrainWorker", "pid": 7, "lines": [*lines, UNNAMED, "a user's own"]})
        assert shown._ended.is_set()
    assert capsys.readouterr().out.splitlines() == ["step 3", "  [7] a user's own"]


def test_where_ray_prints_lines_are_as_they_were_said(printed):
    assert printed(marks=False) == ["step 3"]

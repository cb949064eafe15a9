"""Lines for the user, as the driver shows them and as they are where Ray prints."""

import io
import sys

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


class Terminal(io.StringIO):
    """What stands on a screen of 80 columns after all that was written."""

    def isatty(self):
        return True

    def screen(self):
        lines, column = [[]], 0
        for character in self.getvalue():
            if character == "\n":
                lines.append([])
                column = 0
            elif character == "\r":
                column = 0
            else:
                lines[-1][column : column + 1] = [character]
                column += 1
        return ["".join(line).rstrip() for line in lines]


@pytest.mark.parametrize("live", [True, False])
def test_lines_scroll_above_the_one_that_shows_how_far_the_run_is(capsys, monkeypatch, live):
    for step, known in ((3, {}), (4, {"loss": 1.5, "tokens_per_s": 1234.0, "left_s": 125.0})):
        console.tell({"step": step, "steps": 10, **known})
    console.say("step 4")
    console.say_end()
    first, second, *others = capsys.readouterr().out.splitlines()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    shown, worker = console.Console(live), {"actor_name": "RayTrainWorker", "pid": 7}
    with shown:
        shown._show({**worker, "lines": [first]})
        print("a line")
        print("half ", end="")
        shown._show({**worker, "lines": [second, second[:-9]]})
        middle = terminal.screen()
        print("of another", file=sys.stderr)
        print("and the rest")
        shown._show({**worker, "lines": others})
        shown.wait_for_end(0.0)
        print("no end", end="")
    assert sys.stdout is terminal
    # Each stream keeps a line to itself until it is whole.
    halves = ["of another", "half and the rest"] if live else ["half of another", "and the rest"]
    assert terminal.screen() == ["a line", *halves, "step 4", "no end"]
    assert middle[0] == "a line"
    if live:
        assert middle[1].startswith(" 40% |")
        assert middle[1].endswith("| step 4/10, loss 1.5000, 1,234 tokens/s, 2 min left")

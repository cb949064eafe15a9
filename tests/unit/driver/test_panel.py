"""The panel at the end of a run that was given up."""

import pytest

from areal_ray.cluster.failures import Cause
from areal_ray.driver.panel import show

pytestmark = pytest.mark.unit


def test_the_panel_tells_cause_place_node_and_ledger_on_lines_to_copy(run, capsys):
    run.event("attempt", attempt=1, nodes=["node-a", "node-b"])
    show(Cause(1, "ValueError", "mine", "/home/me/model.py:7 in forward"), run, "/tmp/ray/logs")
    out, err = capsys.readouterr()
    assert out == ""
    rows = dict(line.split(maxsplit=1) for line in err.splitlines()[1:-1])
    assert rows["cause"] == "ValueError: mine"
    assert rows["at"] == "/home/me/model.py:7 in forward"
    assert rows["worker"] == "rank 1 on node node-b"
    assert rows["ledger"] == run.ledger
    assert rows["logs"] == "/tmp/ray/logs (on that node)"


def test_a_worker_that_failed_before_its_attempt_was_written_down_says_where_itself(run, capsys):
    run.event("attempt", attempt=1, nodes=["node-a", "node-b"])
    show(Cause(1, "ValueError", "mine", node="node-c"), run, "/tmp/ray/logs")
    assert "rank 1 on node node-c" in capsys.readouterr().err


def test_the_panel_does_without_what_is_not_known(run, capsys):
    show(Cause(None, "ControllerError", "no room"), run, "/tmp/ray/logs")
    err = capsys.readouterr().err
    assert "ControllerError: no room" in err
    assert "\nat " not in err
    assert "\nworker" not in err

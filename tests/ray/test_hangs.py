"""Workers that do not die but do nothing any more: they are ended, and the run comes back to the same bits."""

import psutil
import pytest

pytestmark = pytest.mark.ray

SYNC = "checkpoint.async_save=false"
SHORT = ("cluster.watchdog.floor_s=3", "cluster.watchdog.factor=3")


def test_a_stopped_and_a_hanging_worker_are_told_ended_and_change_nothing(undisturbed, run, capfd):
    faults = "faults=[{kind: sigstop, rank: 1, step: 6}, {kind: hang, rank: 0, step: 12}]"
    assert run.train(SYNC, *SHORT, faults) == 0
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert [event["step"] for event in run.events("restored")] == [4, 8]

    # A stopped process can say nothing, and the other says that it waits; one that hangs says where.
    stopped, hung = run.events("failure")
    assert (stopped["rank"], stopped["cause"], stopped["step"]) == (1, "stopped", 6)
    assert (hung["rank"], hung["cause"], hung["step"]) == (0, "stuck", 12)
    assert "faults.py:" in hung["where"]
    stuck = {(event["attempt"], event["rank"]): event for event in run.events("stuck")}
    assert set(stuck) >= {(1, 0), (2, 0)}
    assert (1, 1) not in stuck
    assert (stuck[1, 0]["waiting"], stuck[2, 0]["waiting"]) == (True, False)
    stacks = (run.path / stuck[2, 0]["stacks"]).read_text()
    assert "faults.py" in stacks
    assert "before_step" in stacks

    out = capfd.readouterr().out
    assert "worker 1 failed: stopped: no sign of life" in out
    assert "worker 0 failed: stuck: no progress" in out

    left = [process for process in psutil.Process().children(recursive=True) if is_stopped(process)]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


def is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False

"""A run on three machines with networks of their own, as Debian sets them up, whose cables are pulled and put back."""

import sys
import time

import pytest

from areal_ray.tools.chaos.machines import Machines, impossible

from .conftest import EXPERIMENT, Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# So that nobody waits as long as in a real cluster. Workers leave after ten seconds less than the first one.
NODES = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "18",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
DRIVER = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "6"}
OPTIONS = (
    "cluster.watchdog=null",  # nothing but the pulled cable ends a worker
    "cluster.template=false",
    "data.prepared_path=null",  # beside the run, which all machines see
    "faults=[{kind: hang, rank: 1, step: 10}]",  # there is something left to do when it is pulled
)


def wait_until(ready, what, timeout_s=120.0):
    """Look again and again until `ready()`; `what` is said if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.skipif(impossible() is not None, reason=str(impossible()))
def test_workers_that_are_cut_off_leave_and_the_run_ends_in_the_same_bits(undisturbed, tmp_path):
    run, options = Run(tmp_path, "run"), ["--config", EXPERIMENT]
    with Machines(3, tmp_path) as machines:
        nodes = machines.start_ray([0, 1, 1], **NODES)
        command = [sys.executable, "jobs/train.py", *options, *run.arguments, *OPTIONS]
        log = tmp_path / "driver.log"
        driver = machines.head.run(*command, log=log, RAY_ADDRESS=machines.ray_address, **DRIVER)
        wait_until(lambda: "step  9/12" in log.read_text() or driver.poll() is not None, "no step")
        assert len(run.events("attempt")) == 1, log.read_text()
        (attempt,) = run.events("attempt")
        assert {"node1", "node2"} == set(attempt["nodes"]), log.read_text()
        far = [machines[int(name[-1])] for name in attempt["nodes"]]
        ranks = [machine.process(pid) for machine, pid in zip(far, attempt["pids"], strict=True)]
        assert None not in ranks
        for machine in far:
            machine.cut()
        wait_until(lambda: not any(rank.is_running() for rank in ranks), "a rank that is cut off has not left")
        for machine in far:
            machine.mend()
        for machine, node in zip(machines[1:], nodes, strict=True):
            node.wait()  # until Ray there has heard that it counts as dead
            machines.join(machine, 1, **NODES)
        assert driver.wait() == 0, log.read_text()
    assert [event["attempt"] for event in run.events("attempt")] == [1, 2]
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert [path.name for path in run.path.glob("submission*")] == ["submission"]

"""What the kernel says of processes that are gone."""

import pytest

from areal_ray.cluster.failures import Cause
from areal_ray.cluster.killers import cgroup_kills, kernel_says, with_killer

pytestmark = pytest.mark.unit
LOG = """
[10.5] Out of memory: Killed process 41 (ray::RayTrainWo) total-vm:90kB, anon-rss:12300000kB, file-rss:0kB
[11.0] Memory cgroup out of memory: Killed process 42 (python) total-vm:90kB, anon-rss:2000000kB, file-rss:0kB
"""
DEATH = Cause(1, "the worker process died", "exit code 9", infrastructure=True, node="10.0.0.7")


def test_the_kernel_names_the_process_and_whose_memory_ran_out(tmp_path):
    say = [kernel_says(pid, lambda: LOG, lambda: 0) for pid in (41, 42, 4)]
    assert say == [
        "the kernel has killed it when it had 12.3 GB, as memory of the machine ran out",
        "the kernel has killed it when it had 2.0 GB, as memory of its container's limit ran out",
        None,
    ]
    assert kernel_says(4, lambda: "", lambda: 2) == (  # which is no reason to say that memory was the cause
        "since its container was started the kernel has killed 2 processes there to make room, perhaps this one"
    )
    (tmp_path / "events").write_text("low 0\noom 7\noom_kill 3\noom_group_kill 0\n")
    assert (cgroup_kills(tmp_path / "events"), cgroup_kills(tmp_path / "none")) == (3, 0)


def test_a_process_that_died_without_a_word_is_asked_about_where_it_was(run):
    asked = []

    def ask(node, pid):
        asked.append((node, pid))
        return "the kernel has killed it"

    assert with_killer(DEATH, run, ask) == DEATH  # whose ledger knows no processes
    run.event("attempt", attempt=1, world_size=2, pids=[40, 41])
    assert with_killer(DEATH, run, ask).message == "exit code 9; the kernel has killed it"
    assert with_killer(DEATH, run, lambda node, pid: None) == DEATH
    for other in (Cause(1, "ValueError", "mine"), Cause(1, DEATH.kind, "killed for lack of memory, by Ray")):
        assert with_killer(other, run, ask) == other
    assert asked == [("10.0.0.7", 41)]

"""Workers are really killed, and the run comes back to the same bits."""

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

pytestmark = pytest.mark.ray
SYNC = "checkpoint.async_save=false"  # where it matters that a save is committed before the fault that comes after it


def test_undisturbed_run_leaves_what_it_promises(undisturbed):
    result = undisturbed.result()
    assert (result["status"], result["step"], result["world_size"], result["restarts"]) == ("finished", 12, 2, 0)
    assert result["checkpoint"] == "step-00000012.a1"
    assert 0 < result["goodput"]["share"] < 1
    assert [line["step"] for line in undisturbed.metrics()] == [0, 3, 6, 9, 12]
    assert [event["step"] for event in undisturbed.events("saved")] == [4, 8, 12]
    names = {path.name for path in undisturbed.path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "result.json", "step-00000004.a1"} <= names
    held_out = [line["held_out_loss"] for line in undisturbed.metrics() if "held_out_loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]


def reservations() -> dict[str, str]:
    """All that there have been on this cluster, by name, and their state."""
    return {entry["name"]: entry["state"] for entry in placement_group_table().values()}


def keepers() -> set[psutil.Process]:
    """Processes that keep memory, but for those that are there for tests beside this one (`pytest -n 2`)."""
    beside = {str(process.pid) for process in psutil.Process().parent().children()}  # who owns a keeper is an argument
    commands = {each: set(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
    return {
        each
        for each, command in commands.items()
        if "areal_ray.processes.memory_keeper" in command and not beside & command
    }


def test_kills_at_two_steps_change_nothing(undisturbed, run, capfd):
    faults = "faults=[{kind: sigkill, rank: 1, step: 6}, {kind: sigkill, rank: 0, step: 11}]"
    before, actors = set(reservations()), set(ray._private.state.actors())
    assert run.train(SYNC, faults) == 0
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    assert run.result()["restarts"] == 2
    assert [event["step"] for event in run.events("restored")] == [4, 8]
    assert len(run.events("failure")) == 2
    out = capfd.readouterr().out
    assert "restored step-00000004.a1, going on with step 5" in out
    assert "restored step-00000008.a2, going on with step 9" in out
    assert "could not be asked" not in out
    # The three attempts had the same places, which are given back.
    (reserved,) = set(reservations()) - before
    assert reservations()[reserved] == "REMOVED"
    mine = [entry for name, entry in ray._private.state.actors().items() if name not in actors]
    assert {entry["ActorClassName"] for entry in mine} == {"Controller", "RayTrainWorker", "SynchronizationActor"}


def test_kills_cost_no_more_than_the_steps_since_the_last_copy_in_memory(undisturbed, run, capfd):
    faults = "faults=[{kind: sigkill, rank: 1, step: 4}, {kind: sigkill, rank: 0, step: 11}]"
    before = keepers()
    assert run.train("checkpoint.memory_every_steps=1", SYNC, faults) == 0
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    found = [(event["step"], event["checkpoint"], event["memory"]) for event in run.events("restored")]
    assert found == [(3, None, "step-00000003.a1"), (10, None, "step-00000010.a2")]
    assert run.result()["goodput"]["lost_steps"] == 0
    out = capfd.readouterr().out
    assert "restored step 3 from memory, going on with step 4" in out
    assert "restored step 10 from memory, going on with step 11" in out
    assert psutil.wait_procs(keepers() - before, timeout=30)[1] == []


def test_a_checkpoint_that_is_newer_than_the_copies_in_memory_is_restored(undisturbed, run):
    assert run.train("checkpoint.memory_every_steps=3", SYNC, "faults=[{kind: sigkill, rank: 1, step: 5}]") == 0
    assert [event["checkpoint"] for event in run.events("restored")] == ["step-00000004.a1"]
    assert run.digest() == undisturbed.digest()


def test_exit_and_exception_change_nothing(undisturbed, run):
    assert run.train("faults=[{kind: exit, rank: 0, step: 2}, {kind: exception, rank: 1, step: 7}]") == 0
    assert run.digest() == undisturbed.digest()
    # The first fault comes before any checkpoint. At the second the save of step 4 may still be under way; what is not
    # committed is computed again.
    assert {event["step"] for event in run.events("started")} == {0}
    assert {event["step"] for event in run.events("restored")} <= {4}
    assert [event["attempt"] for event in run.events("attempt")] == [1, 2, 3]
    assert run.metrics() == undisturbed.metrics()


def test_stopping_and_going_on_changes_nothing(undisturbed, run, capfd):
    assert run.train("train.stop_at=7") == 0
    assert run.result()["status"] == "stopped"
    assert run.result()["checkpoint"] == "step-00000007.a1"
    assert run.train() == 0
    assert run.result()["status"] == "finished"
    assert run.digest() == undisturbed.digest()
    assert run.metrics() == undisturbed.metrics()
    capfd.readouterr()
    assert run.train() == 0
    assert "has finished step 12 already" in capfd.readouterr().out


def test_too_many_failures_end_in_one_panel(run, capfd):
    assert run.train(SYNC, "cluster.max_failures=0", "faults=[{kind: exception, rank: 1, step: 6}]") == 1
    panel = capfd.readouterr().err
    assert "training failed" in panel
    assert "FaultInjected: the configured fault: an exception on rank 1 before step 6" in panel
    assert "faults.py:" in panel
    assert "rank 1 on node" in panel
    assert run.result()["status"] == "failed"
    assert run.result()["checkpoint"] == "step-00000004.a1"
    # The fault is remembered, so the same command goes on.
    assert run.train(SYNC, "cluster.max_failures=0", "faults=[{kind: exception, rank: 1, step: 6}]") == 0
    assert [event["step"] for event in run.events("restored")] == [4]


def test_recover_policies(undisturbed, run, capfd):
    assert run.train("run.recover=resume") == 2
    assert "run.recover: `resume`, but" in capfd.readouterr().err
    assert undisturbed.train("model.config.hidden_size=128") == 2
    assert "model.config: this run's checkpoints are of another model: hidden_size was 64" in capfd.readouterr().err
    assert undisturbed.train("run.seed=5") == 2
    assert undisturbed.train("train.seq_len=32") == 2
    assert "data: files, tokenizer or train.seq_len" in capfd.readouterr().err
    assert undisturbed.train("run.recover=fresh") == 2
    assert "run.recover: `fresh`, but" in capfd.readouterr().err

"""Storage in the way of a run: saves that fail, checkpoints that are damaged, Ray's list of them torn."""

import shutil

import pytest

pytestmark = pytest.mark.ray


def test_a_save_that_fails_does_not_stop_the_run(undisturbed, run, capfd):
    run.path.mkdir(parents=True)
    (run.path / "step-00000008.a1").write_text("in the way of the second save")
    assert run.train() == 0
    assert [event["step"] for event in run.events("save_failed")] == [8]
    assert [event["step"] for event in run.events("saved")] == [4, 12]
    assert "saving step-00000008.a1 failed" in capfd.readouterr().out
    assert run.result()["restarts"] == 0
    assert run.digest() == undisturbed.digest()


def test_a_run_stops_when_too_many_saves_fail(run, capfd):
    run.path.mkdir(parents=True)
    for step in (4, 8):
        (run.path / f"step-{step:08d}.a1").write_text("in the way")
    assert run.train("checkpoint.max_failed_saves=2", "cluster.max_failures=0") == 1
    panel = capfd.readouterr().err
    assert "FileExistsError" in panel
    assert "step-00000008.a1" in panel


def test_damage_and_a_torn_list_lead_back_to_the_newest_good_checkpoint(undisturbed, run, capfd):
    assert run.train("train.stop_at=9") == 0
    shard = run.path / "step-00000009.a1" / "shard-00001.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    shutil.rmtree(run.path / "step-00000004.a1")
    snapshot = run.path / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:-20])
    assert run.train() == 0
    assert [(event["step"], event["checkpoint"]) for event in run.events("restored")] == [(8, "step-00000008.a1")]
    (passed_over,) = run.events("passed_over")
    assert passed_over["checkpoint"] == "step-00000009.a1"
    assert "shard-00001.distcp: the checksum" in passed_over["reason"]
    assert "passing over step-00000009.a1" in capfd.readouterr().out
    assert run.digest() == undisturbed.digest()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(run, capfd):
    assert run.train("train.stop_at=4") == 0
    manifest = run.path / "step-00000004.a1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("xxh3_128", "xxh3_129"))
    assert run.train("cluster.max_failures=0") == 1
    assert "not starting over" in capfd.readouterr().err


def test_retention_keeps_what_it_says(undisturbed, run):
    keep = (
        "checkpoint.async_save=false",
        "checkpoint.every_steps=2",
        "checkpoint.keep.last=2",
        "checkpoint.keep.every_steps=6",
    )
    assert run.train(*keep, "faults=[{kind: sigkill, rank: 0, step: 8}]") == 0
    left = sorted(path.name for path in run.path.glob("step-*"))
    assert left == ["step-00000006.a1", "step-00000010.a2", "step-00000012.a2"]
    assert [event["checkpoint"] for event in run.events("deleted")] == [
        "step-00000002.a1",
        "step-00000004.a1",
        "step-00000008.a2",
    ]

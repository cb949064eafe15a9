"""verify-resume: kills, two changes of the number of workers, and a table that says that it is the same run."""

import json

import pytest

from areal_ray.cli.main import main as run_cli

from .conftest import EXPERIMENT, SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_tiny_experiment_keeps_what_is_promised(tmp_path, capfd):
    folder = tmp_path / "runs"
    sizes = [*SMALL, "checkpoint.every_steps=3"]
    assert run_cli(["verify-resume", "--config", EXPERIMENT, "--kills", "1", "--folder", str(folder), *sizes]) == 0
    out = capfd.readouterr().out
    assert "all as promised" in out
    assert "2 -> 1 -> 2" in out
    assert "NOT KEPT" not in out
    failures = [
        line
        for name in ("killed", "resized")
        for line in (folder / name / "events.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "failure"
    ]
    assert len(failures) == 2


def test_it_writes_into_an_empty_folder_only(tmp_path, capfd):
    (tmp_path / "mine").write_text("here")
    assert run_cli(["verify-resume", "--config", EXPERIMENT, "--folder", str(tmp_path), *SMALL]) == 2
    assert "is not empty" in capfd.readouterr().err

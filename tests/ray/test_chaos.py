"""Short runs under real faults; the long one is `make chaos`."""

import os
import re
import subprocess
import sys
from uuid import uuid4

import pytest

from areal_ray.cli.main import main as run_cli

from .conftest import EXPERIMENT, ROOT, SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def chaos(tmp_path, *arguments, minutes, seed, environment=None):
    command = [sys.executable, "-m", "areal_ray.cli.main", "chaos", "--config", EXPERIMENT]
    own = ["--minutes", str(minutes), "--seed", str(seed), "--folder", str(tmp_path / "chaos"), *arguments, *SMALL]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run([*command, *own], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) faults of", done.stdout)[1]) >= 1
    assert "digest at step" in done.stdout
    assert done.stdout.rstrip().endswith("all as promised")


def test_nothing_is_lost_under_faults_in_a_seeded_order(tmp_path):
    chaos(tmp_path, "cluster.standbys=auto", minutes=0.5, seed=3)


def test_nothing_is_lost_when_the_storage_server_stops_for_a_while(server, tmp_path):
    which = ["--only", "the storage server stops", "--storage-process", str(server.pid)]
    path = f"run.storage_path=s3://runs/{uuid4().hex}"
    chaos(tmp_path, *which, path, minutes=0.05, seed=1, environment=server.environment)


def test_a_fault_that_cannot_be_is_told_before_anything_is_started(tmp_path, capsys):
    own = ["--only", "the storage server stops", "--folder", str(tmp_path / "chaos")]
    assert run_cli(["chaos", "--config", EXPERIMENT, *own, *SMALL]) == 1
    error = capsys.readouterr().err
    assert "no such faults here: the storage server stops; there are: SIGKILL of a worker, " in error

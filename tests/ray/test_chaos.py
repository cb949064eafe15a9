"""A short run under real faults of every kind that comes first; the long one is `make chaos`."""

import re
import subprocess
import sys

import pytest

from .conftest import EXPERIMENT, ROOT, SMALL

pytestmark = pytest.mark.ray


def test_nothing_is_lost_under_faults_in_a_seeded_order(tmp_path):
    command = [
        sys.executable,
        "-m",
        "areal_ray.cli",
        "chaos",
        "--config",
        EXPERIMENT,
        "--minutes",
        "0.5",
        "--seed",
        "3",
    ]
    own = ["--folder", str(tmp_path / "chaos"), *SMALL, "cluster.standbys=auto"]
    done = subprocess.run([*command, *own], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) faults of", done.stdout)[1]) >= 1
    assert "digest at step" in done.stdout
    assert done.stdout.rstrip().endswith("all as promised")

"""A thousand mutated checkpoints, lists and configs: none loads wrong, none is a traceback. `make fuzz` has more."""

import subprocess
import sys

import pytest

from tests.conftest import HERE

pytestmark = pytest.mark.unit
KINDS = (
    "format 2, damaged",
    "format 2, forged",
    "format 1, damaged",
    "format 1, forged",
    "list of checkpoints",
    "config",
)


def test_a_thousand_mutations_end_right_or_in_one_line():
    # In a process of its own, which forks: this one may have threads.
    only = [word for kind in KINDS for word in ("--only", kind)]
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "1000", *only]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 cases" in done.stdout

"""Standard output that is full or that nobody reads: no traceback, and the status is that of the work."""

import subprocess
import sys
from pathlib import Path

import pytest

from areal_ray.cli.main import main

pytestmark = pytest.mark.unit

EXPERIMENT = str(Path(__file__).parents[3] / "conf/experiments/tiny.yaml")
PRINT = "from areal_ray.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
# A command that has more to say than a pipe holds, and then something to do.
LONG = """
import sys
from areal_ray.cli.output import losable_output
with losable_output() as output:
    for _ in range(100_000):
        print("a line that is printed again and again")
    open(sys.argv[1], "w").close()
sys.exit(0 if output.lost else 9)
"""


def run(code, *arguments, **how):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **how)


def test_a_full_device_is_one_line():
    with open("/dev/full", "w") as full:
        done = run(PRINT, "train", "--config", EXPERIMENT, "--print-config", stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        "areal-ray: the output could not be written: No space left on device\n",
    )


def test_work_goes_on_when_nobody_reads_any_more(tmp_path):
    with subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        done = run(LONG, str(tmp_path / "done"), stdout=head.stdin)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists()


def test_without_an_output_there_is_nothing_to_write(tmp_path):
    done = run(
        PRINT,
        "train",
        "--config",
        EXPERIMENT,
        "--print-config",
        stdout=None,
        preexec_fn=lambda: __import__("os").close(1),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(config, say):
        raise KeyboardInterrupt

    monkeypatch.setattr("areal_ray.driver.data.prepare_all", interrupted)
    assert main(["prepare", "--config", "conf/experiments/tiny.yaml"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "areal-ray: interrupted; the same command goes on with what is finished"

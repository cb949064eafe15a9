"""Who is told of a run's end: functions and commands, those that fail and those that hang among them."""

import json
import os
import threading
import time

import pytest

from areal_ray.config import ConfigError, load
from areal_ray.driver.on_end import check_on_end, tell_end

pytestmark = pytest.mark.unit
RESULT = {"status": "failed", "step": 7, "loss": None}
HERE = "tests.unit.driver.test_on_end"
told, going_on = [], threading.Event()


def keep(result, directory):
    told.append((result, directory))


def fail(result, directory):
    raise ConnectionError("nobody there")


def hang(result, directory):
    going_on.wait()


def only_one(result): ...


def test_a_function_is_given_the_result_and_where_the_run_is():
    told.clear()
    said = []
    tell_end(f"{HERE}:keep", RESULT, "s3://bucket/run", said.append)
    tell_end(None, RESULT, "s3://bucket/run", said.append)
    assert (told, said) == ([(RESULT, "s3://bucket/run")], [])


def test_a_command_has_the_result_on_its_input_and_the_rest_in_its_environment(tmp_path):
    said = []
    command = f'{{ cat; echo "$AREAL_RAY_STATUS $AREAL_RAY_RUN_DIRECTORY"; }} > {tmp_path}/told'
    tell_end(command, RESULT, "/runs/mine", said.append)
    text, _, last = (tmp_path / "told").read_text().rstrip("\n").rpartition("\n")
    assert (json.loads(text), last, said) == (RESULT, "failed /runs/mine", [])


@pytest.mark.parametrize(
    ("on_end", "said"),
    [
        (f"{HERE}:fail", "on_end: ConnectionError: nobody there"),
        (f"{HERE}:hang", "on_end: TimeoutError: tests.unit.driver.test_on_end:hang has not returned after 0 s"),
        ("exit 3", "on_end: RuntimeError: the command ended with status 3"),
        ("true; exec 0<&-", None),  # it reads nothing
    ],
)
def test_what_goes_wrong_is_said_and_changes_nothing(on_end, said):
    lines = []
    going_on.clear()
    tell_end(on_end, RESULT, "/runs/mine", lines.append, limit_s=0.05 if "hang" in on_end else 60.0)
    going_on.set()
    assert lines == [said] * (said is not None)


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started(tmp_path):
    said = []
    tell_end(f"sleep 600 & echo $! > {tmp_path}/pid; wait", RESULT, "/runs/mine", said.append, limit_s=0.5)
    assert said == ["on_end: TimeoutError: the command has not ended after 0 s"]
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                break
    assert time.monotonic() < until


@pytest.mark.parametrize("wrong", [f"{HERE}:nobody", f"{HERE}:only_one", "nothing.here:f"])
def test_a_function_that_cannot_be_called_is_found_before_anything_starts(wrong):
    check_on_end("curl -d @- https://example.org/hook:1")
    check_on_end(None)
    check_on_end(f"{HERE}:keep")
    with pytest.raises(ConfigError) as caught:
        check_on_end(wrong)
    assert caught.value.key == "on_end"


def test_an_empty_one_is_refused():
    with pytest.raises(ConfigError, match="on_end: is empty"):
        load("conf/experiments/tiny.yaml", ["on_end='  '"])

"""The fork server as the driver has it: its command for Ray, and when there is none."""

import json
import os
import shlex
import subprocess
import sys

import psutil
import pytest

from areal_ray.config import ClusterConfig, Config, ModelConfig
from areal_ray.processes import fork_server, launch
from areal_ray.processes.fork_server import ForkServer, fork_server_for, process_environment

from .forks import LIMIT_S, PREPARATION, until_there

pytestmark = pytest.mark.unit


@pytest.fixture
def own():
    made = ForkServer(ModelConfig(config={"model_type": "llama"}), PREPARATION, process_environment(Config()))
    until_there(made._name, made._process)
    yield made
    made.close()


def test_the_driver_s_ends_when_it_is_closed(own):
    process = psutil.Process(own._process.pid)
    own.close()
    assert not process.is_running()


def through_ray(executable, script, *arguments):
    """As Ray's agent on a node starts a process."""
    command = ["bash", "-c", f"exec {executable} {shlex.quote(str(script))} {shlex.join(arguments)}"]
    environment = {**os.environ, **process_environment(Config())}  # as driver/connect.py has Ray set it
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=LIMIT_S, env=environment)


def test_the_command_for_ray_reaches_it(own, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("import sys\nprint('torch' in sys.modules, sys.argv[1:])")
    assert through_ray(own.executable, script, "--a", "b c").stdout == "True ['--a', 'b c']\n"


def test_where_nothing_of_it_is_found_ray_has_its_own_python(own, tmp_path, monkeypatch):
    script = tmp_path / "lib/python3.99/site-packages/worker.py"
    script.parent.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    script.write_text("import sys\nprint(sys.executable, sys.argv[1:])")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "elsewhere.py"))
    done = through_ray(own.executable, script, "--a", "b c")
    assert done.stdout == f"{tmp_path}/bin/python3 ['--a', 'b c']\n"


def test_a_job_without_gpus_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert process_environment(Config())["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in process_environment(Config(cluster=ClusterConfig(use_gpu=True)))


def test_there_may_be_none(monkeypatch):
    monkeypatch.setattr(fork_server, "ForkServer", lambda *_: "made")
    monkeypatch.delenv("UV", raising=False)
    assert fork_server_for(Config(), PREPARATION) == "made"
    assert fork_server_for(Config(cluster=ClusterConfig(template=False)), PREPARATION) is None
    monkeypatch.setenv("UV", "/bin/uv")
    assert fork_server_for(Config(), PREPARATION) is None


@pytest.mark.parametrize("environment", [{"pip": ["x"]}, {"py_executable": "other"}, {"image_uri": "x"}])
def test_jobs_that_bring_their_own_interpreter_have_none(monkeypatch, environment):
    monkeypatch.setattr(fork_server, "ForkServer", lambda *_: "made")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "."}}))
    assert fork_server_for(Config(), PREPARATION) == "made"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
    assert fork_server_for(Config(), PREPARATION) is None

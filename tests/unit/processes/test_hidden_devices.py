"""What is prepared before a process knows its GPU touches none, and leaves the environment as it was."""

import json
import os
import subprocess
import sys

import pytest
import torch

from areal_ray.processes.hidden_devices import hidden_devices

pytestmark = pytest.mark.unit

# A build of torch for GPUs on a node with eight of them, as far as Python sees: every entry to CUDA is written down.
FAKE = """
import json, os, sys
import torch
import torch._dynamo  # which takes more of CUDA from a build that has it
calls = []
def entry(name, result=None):
    def call(*args, **kwargs):
        calls.append(name)
        return result
    return call
torch.cuda._is_compiled = lambda: True
torch.cuda._raw_device_count_nvml = lambda: 8
torch.cuda._lazy_init = entry("_lazy_init")
torch._C._cuda_getDeviceCount = entry("_cuda_getDeviceCount", 8)
torch._C._ensureCUDADeviceGuardSet = entry("_ensureCUDADeviceGuardSet")  # counts devices, too, and remembers
torch._C._accelerator_getStream = entry("_accelerator_getStream")
torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
{work}
print(json.dumps([calls, os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")]))
"""
WARM_UP = "from areal_ray.engine.warmup import warm_up; warm_up(); assert warm_up.cache_info().currsize == 1"
PREPARE = """
from areal_ray.config import ModelConfig
from areal_ray.driver import fork_preparation
from areal_ray.processes.fork_server_main import Server
server = Server("name", os.getpid(), "areal_ray.driver.fork_preparation", None)
server._try(lambda: fork_preparation.prepare(ModelConfig(config={"model_type": "qwen3"})))
assert not server._broken
from areal_ray.engine.warmup import warm_up
assert warm_up.cache_info().currsize == 1
"""
RAY = """
from areal_ray.driver import fork_preparation
fork_preparation.import_ray()
import ray
assert ray._private.worker.global_worker.original_visible_accelerator_ids["GPU"] == ["4", "5", "6", "7"]
"""
STANDBY = """
import threading
from areal_ray.driver import warm_start
warm_start.ready_folder = lambda kind: __import__("pathlib").Path(os.environ["FOLDER"])
os.environ["AREAL_RAY_WARM"] = json.dumps({"config": {"model_type": "qwen3"}})
warm_start.warm()
assert os.listdir(os.environ["FOLDER"]) == [str(os.getpid())]
"""


@pytest.mark.parametrize("work", [WARM_UP, PREPARE, RAY, STANDBY], ids=["warm-up", "fork server", "Ray", "standby"])
def test_whatever_prepares_a_process_never_enters_cuda(work, tmp_path):
    command = [sys.executable, "-c", FAKE.replace("{work}", work)]
    done = subprocess.run(
        command, env={**os.environ, "FOLDER": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], "4,5,6,7", None]


def test_the_environment_is_as_before_also_after_a_failure(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    seen = []

    def fail():
        seen.extend(os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"))
        raise LookupError

    with pytest.raises(LookupError), hidden_devices():
        fail()
    assert seen == ["", "1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def test_a_gpu_that_ray_gives_the_process_meanwhile_stays_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with hidden_devices():
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_preparation_that_starts_cuda_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="has started CUDA"), hidden_devices():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with hidden_devices():  # it had been started before: nothing to say
        pass


def test_training_that_has_begun_beside_a_late_preparation_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with hidden_devices():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"

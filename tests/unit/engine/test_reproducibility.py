"""Switches for the same bits on a GPU: set before CUDA and NCCL are called, and nothing without them."""

import os
import subprocess
import sys

import pytest
import torch

from areal_ray.config import Config, EngineConfig
from areal_ray.engine import fsdp
from areal_ray.engine.reproducibility import set_process_switches

pytestmark = pytest.mark.unit

SHOW = """
import os, torch
from areal_ray.config import EngineConfig
from areal_ray.engine.reproducibility import set_process_switches
set_process_switches(EngineConfig({how}))
print(
    torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
    torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision(),
    *(os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_NVLS_ENABLE")),
)
"""


@pytest.mark.parametrize(
    ("how", "seen"),
    [
        ("", "False True False highest None None None"),
        ("deterministic=True", "True False True highest :4096:8 Ring 0"),
        ("tf32=True", "False True False high None None None"),
    ],
)
def test_the_switches_of_the_process(how, seen):
    code, names = SHOW.format(how=how), ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_NVLS_ENABLE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seen


def test_what_the_environment_says_is_left_as_it_is(monkeypatch):
    for name, value in (("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":16:8"), ("NCCL_NVLS_ENABLE", "1")):
        monkeypatch.setenv(name, value)
    for name in ("use_deterministic_algorithms", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    set_process_switches(EngineConfig(deterministic=True))
    assert (os.environ["NCCL_ALGO"], os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ("Tree", ":16:8")


def test_they_are_set_when_the_engine_is_made_before_anybody_touches_the_device(monkeypatch):
    made = []
    monkeypatch.setattr(fsdp, "set_process_switches", made.append)
    config = Config(engine=EngineConfig(deterministic=True))
    fsdp.FSDPEngine(config, "cuda")
    assert made == [config.engine]

"""When one rank checks its device: before anything is built on it, and not on a CPU."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from areal_ray.cluster.bad_devices import BadDevice, DeviceName
from areal_ray.config import load
from areal_ray.run import JobContext, RunDir
from areal_ray.storage import LocalStorage
from areal_ray.worker import device_check, main, wiring

pytestmark = pytest.mark.unit

EXPERIMENT = str(Path(__file__).parents[3] / "conf/experiments/tiny.yaml")
BAD = BadDevice(DeviceName("host-7", "ab12", 0, "GPU-1"), "uncorrected ECC errors")


class Built(Exception):
    pass


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts a rank whose model cannot be built; what was called in which order is in `calls`."""
    calls = []

    def start(use_gpu, problem=None, built=None):
        def check(device):
            calls.append(("check", device))
            if problem:
                raise problem

        class Engine:
            def __init__(self, *_, **__):
                calls.append(("settings",))  # of the process, that cuBLAS reads when it is used first

            def initialize(self, **_):
                calls.append(("build",))
                raise built or Built

        monkeypatch.setattr(main.sidecars, "head_watch", nullcontext)
        monkeypatch.setattr(main.sidecars, "check_storage", lambda context, ranks: calls.append(("storage",)))
        monkeypatch.setattr(main.sidecars, "check_versions", lambda context, ranks: calls.append(("versions",)))
        monkeypatch.setattr(main, "get_device", lambda: torch.device("cuda", 3))
        monkeypatch.setattr(device_check, "CudaDevice", lambda index, node: f"cuda:{index}")
        monkeypatch.setattr(device_check, "check", check)
        monkeypatch.setattr(wiring, "FSDPEngine", Engine)
        config = load(EXPERIMENT, [f"cluster.use_gpu={use_gpu}", "cluster.watchdog=null"])
        main.main(config, JobContext(RunDir(LocalStorage(tmp_path)), "it"))

    before = torch.get_num_threads()
    yield start, calls
    torch.set_num_threads(before)


def test_a_gpu_is_checked_before_anything_is_built(start):
    run, calls = start
    with pytest.raises(Built):
        run(True)
    assert calls == [("versions",), ("storage",), ("settings",), ("check", "cuda:3"), ("build",)]


def test_a_bad_gpu_ends_the_rank_before_and_is_told_to_the_controller(start):
    run, calls = start
    with pytest.raises(BadDevice) as caught:
        run(True, problem=BAD)
    assert calls == [("versions",), ("storage",), ("settings",), ("check", "cuda:3")]
    assert caught.value.areal_ray["step"] is None


def test_an_error_of_the_hardware_becomes_a_bad_device(start, monkeypatch):
    run, _ = start
    monkeypatch.setattr(device_check, "blame", lambda device, error: BAD if device else error)
    with pytest.raises(BadDevice):
        run(True, built=torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))


def test_on_a_cpu_there_is_no_device(start):
    run, calls = start
    with pytest.raises(Built):
        run(False)
    assert calls == [("versions",), ("storage",), ("settings",), ("check", None), ("build",)]

"""The check of a GPU, on one."""

import time

import pytest
import torch

from areal_ray.worker.device_check import CudaDevice, check
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def check_twice(rank: int) -> list[float]:
    torch.cuda.init()
    torch.empty(1, device="cuda")  # the context, which training needs anyway
    device, took = CudaDevice(0, lambda: ("host", "id")), []
    for _ in range(2):
        begin = time.perf_counter()
        check(device)
        took.append(time.perf_counter() - begin)
    assert device.name().uuid.startswith("GPU-")
    return took


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_passes_in_less_than_a_second() -> None:
    (took,) = run_ranks(check_twice, 1, gpu=True)
    assert max(took) < 1.0, took

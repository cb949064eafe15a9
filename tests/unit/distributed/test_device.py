"""Copies to a GPU through pinned buffers, and the device of threads, with CUDA's part of it recorded."""

import threading
from contextlib import nullcontext

import pytest
import torch

from areal_ray.distributed import device
from areal_ray.distributed.device import Uploads, device_thread

pytestmark = pytest.mark.unit


class OnGpu(torch.Tensor):
    is_cuda = property(lambda self: True)


@pytest.fixture
def done(monkeypatch):
    """What was done, in order; buffers hold 64 bytes."""
    done, made, empty = [], iter("ab"), torch.empty

    class Event:
        def __init__(self):
            self.name = next(made)

        def record(self, stream):
            done.append(f"record {self.name}")

        def synchronize(self):
            done.append(f"wait {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, pin_memory: (done.append("pin"), empty(size, dtype=dtype))[1]
    )
    monkeypatch.setattr(device, "_BUFFER", 64)
    return done


def test_a_large_tensor_goes_in_parts_through_two_buffers_in_turn(done):
    source, uploads = torch.arange(48.0).view(6, 8), Uploads()  # 192 bytes
    target = torch.zeros(6, 8).as_subclass(OnGpu)
    uploads.copy(target, source)
    assert torch.equal(target.as_subclass(torch.Tensor), source)
    # A buffer is filled again when the copy from it is over.
    assert done == ["pin", "pin", "wait b", "record b", "wait a", "record a", "wait b", "record b"]
    done.clear()
    uploads.copy(torch.zeros(2).as_subclass(OnGpu), torch.ones(2))
    uploads.wait()
    assert done == ["wait a", "record a", "wait a", "wait b"]


@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_shapes_of_all_kinds(done, shape):
    target = torch.zeros(shape, dtype=torch.bfloat16).as_subclass(OnGpu)
    Uploads().copy(target, torch.ones(shape, dtype=torch.bfloat16))
    assert torch.equal(target.as_subclass(torch.Tensor), torch.ones(shape, dtype=torch.bfloat16))


def test_parts_that_are_no_piece_of_memory_are_copied_too(done):
    source = torch.arange(24.0).view(4, 6)
    whole = torch.zeros(4, 6)
    uploads = Uploads()
    uploads.copy(whole[:, :3].as_subclass(OnGpu), source[:, :3])  # the target is none
    target = torch.zeros(4, 3).as_subclass(OnGpu)
    uploads.copy(target, source[:, 3:])  # the source is none
    assert torch.equal(whole[:, :3], source[:, :3])
    assert torch.equal(target.as_subclass(torch.Tensor), source[:, 3:])


def test_on_a_cpu_nothing_is_pinned(done):
    target = torch.zeros(100)
    Uploads().copy(target, torch.ones(100))
    assert (done, float(target.sum())) == ([], 100.0)


def test_a_thread_works_on_the_gpu_of_its_maker(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: seen.append((index, threading.current_thread().name)))
    with device_thread("copies") as pool:
        pool.submit(lambda: seen.append("work")).result()
    assert seen == [(3, "copies_0"), "work"]


def test_without_a_gpu_it_sets_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("there is none"))
    with device_thread("copies") as pool:
        assert pool.submit(lambda: 7).result() == 7

"""Memory of an image when it is pinned for a GPU, with CUDA's part of it recorded: nothing is kept of what failed."""

import mmap
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from areal_ray.checkpoint.format.shard_file import ShardImage

pytestmark = pytest.mark.unit


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU; what is done with it is written down in `Cuda.done`."""

    is_cuda = property(lambda self: True)
    record_stream = lambda self, stream: None  # noqa: E731


class Cuda:
    """CUDA's runtime and streams."""

    def __init__(self, code):
        self.done, self.code = [], code

    def cudaHostRegister(self, address, size, flags):
        self.done.append(f"register {size}")
        return self.code

    def cudaHostUnregister(self, address):
        self.done.append("unregister")
        return 0

    def check_error(self, code):
        if code:
            raise RuntimeError("CUDA error: out of memory")

    def stream(self, stream):
        self.done.append("side stream")
        return nullcontext()


@pytest.fixture(params=[0])
def cuda(request, monkeypatch):
    cuda = Cuda(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", cuda.check_error)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    waits = SimpleNamespace(wait_stream=lambda stream: cuda.done.append(f"wait for {stream}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: waits)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: cuda.done.append("event")))
    return cuda


def items(*values):
    return [torch.full((4,), value).as_subclass(OnGpu) for value in values]


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def mappings():
    return Path("/proc/self/maps").read_text().count("areal_ray shard image")


def test_pinned_memory_is_given_back_before_its_file(cuda):
    before = descriptors(), mappings()
    image = ShardImage("x", items(1.0, 2.0))
    assert cuda.done == [f"register {image.size}"]
    assert image.not_pinned is None
    image.close()
    assert cuda.done == [f"register {image.size}", "unregister"]
    del image
    assert (descriptors(), mappings()) == before


@pytest.mark.parametrize("cuda", [2], indirect=True)
def test_where_nothing_can_be_pinned_the_copy_is_waited_for(cuda):
    before = descriptors(), mappings()
    image = ShardImage("x", items(1.0, 2.0))
    assert "CUDA cannot lock 0.0 GB of memory (CUDA error: out of memory)" in image.not_pinned
    assert image.fill([*items(3.0, 4.0)], [True, False]) is None
    assert [tensor.tolist() for tensor in image.tensors] == [[3.0] * 4, [4.0] * 4]
    image.close()
    assert "unregister" not in cuda.done
    del image
    assert (descriptors(), mappings()) == before


@pytest.mark.parametrize("failing", ["ftruncate", "mmap", "_pin"])
def test_of_an_image_that_cannot_be_made_nothing_is_kept(cuda, monkeypatch, failing):
    def fail(*_):
        raise OSError("no memory")

    before = descriptors(), mappings()
    owner = {"ftruncate": os, "mmap": mmap, "_pin": ShardImage}[failing]
    monkeypatch.setattr(owner, failing, fail)
    for _ in range(3):
        with pytest.raises(OSError, match="no memory"):
            ShardImage("x", items(1.0))
    assert (descriptors(), mappings()) == before


def test_what_a_forward_pass_may_change_is_copied_before_it_on_its_own_stream(cuda, monkeypatch):
    image = ShardImage("x", items(0.0, 0.0, 0.0))
    cuda.done.clear()
    image.tensors = [
        SimpleNamespace(copy_=lambda tensor, non_blocking, name=name: cuda.done.append(name)) for name in "abc"
    ]
    image.fill([*items(1.0, 2.0, 3.0)], [False, True, False])
    assert cuda.done == ["b", "wait for main", "side stream", "a", "c", "event"]


def test_memory_can_be_used_again(cuda):
    first = ShardImage("x", items(1.0))
    kept = os.dup(first.fd)
    first.close()
    again = ShardImage("x", items(1.0), reused=kept)
    again.fill([torch.full((4,), 5.0)], [True])
    assert (again.fd, cuda.done.count("unregister")) == (kept, 1)
    again.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept)

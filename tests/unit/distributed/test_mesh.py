"""Device of a rank and first collectives of its groups, with recorded calls in the place of CUDA and NCCL."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from areal_ray.distributed import mesh

pytestmark = pytest.mark.unit


@pytest.fixture
def cuda(monkeypatch):
    """Two visible GPUs, the second of which is the present one; and what was done, in order."""
    done = []
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"set {device}"))
    monkeypatch.setattr(mesh, "connect", lambda name, _, device, entering: done.append(f"connect {name} on {device}"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **how: done.append(f"join with {how['device_id']}"))
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return done


def test_the_gpu_that_ray_has_set_is_kept_and_groups_are_split_off_what_is_connected(cuda, monkeypatch):
    class World:
        bound = None

        @property
        def bound_device_id(self):
            return self.bound

        @bound_device_id.setter
        def bound_device_id(self, device):
            cuda.append(f"bind {device}")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", World)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=World()))
    monkeypatch.setenv("LOCAL_RANK", "0")  # as Ray counts them, whatever GPUs other jobs of the node have
    assert mesh.init_distributed(60, "cuda") == torch.device("cuda", 1)
    assert cuda == ["set cuda:1", "connect all ranks on cuda:1", "bind cuda:1"]


def test_under_torchrun_it_is_that_of_the_local_rank_and_the_group_is_bound_to_it(cuda, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert mesh.init_distributed(60) == torch.device("cuda", 1)
    assert cuda == ["set cuda:1", "join with cuda:1", "connect all ranks on cuda:1"]


def test_a_rank_without_a_gpu_of_its_own_is_refused(cuda, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"rank 2 of this node \(LOCAL_RANK\) has no GPU of its own: it sees 2"):
        mesh.init_distributed(60, "cuda")
    assert cuda == []


def test_a_process_that_is_shown_one_gpu_takes_it(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert mesh.init_distributed(60, "cuda") == torch.device("cuda", 0)


def test_a_group_that_cannot_connect_is_named(monkeypatch):
    def fail(*_, **__):
        assert entered == ["connect the 4 ranks of dimension shard"]  # said before: with NCCL nothing may come after
        raise RuntimeError("NCCL error: unhandled system error")

    entered = []

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(RuntimeError, match="the 4 ranks of dimension shard of the mesh cannot reach each other: NCCL"):
        mesh.connect("the 4 ranks of dimension shard", None, torch.device("cpu"), entered.append)

"""Warm-up of torch: a tiny model is trained, saved and loaded, so that everything lazy happens ahead of need."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from areal_ray.config import Config, ModelConfig
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.processes.hidden_devices import hidden_devices

_TINY = {
    "model_type": "qwen3",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@cache
def warm_up() -> None:
    """Train, save and load a tiny model. The second call does nothing, in the same process or in a fork of it.

    It leaves no process group and no thread, and PyTorch with one thread for its operations. It sees no GPU: an
    optimizer's step, among others, would start CUDA.
    """
    with hidden_devices(), _kept_device_guard():
        _warm_up()


@contextmanager
def _kept_device_guard() -> Iterator[None]:
    """Keep FakeTensorMode, which DTensor asks for shapes, from taking CUDA's device guard away.

    Where no device is visible it counts them all the same, in C++, which remembers that there is none; and it puts a
    guard that does nothing in the place of CUDA's. After that neither this process nor a fork of it can use a GPU.
    """
    ensure = torch._C._ensureCUDADeviceGuardSet
    torch._C._ensureCUDADeviceGuardSet = lambda: None
    try:
        yield
    finally:
        torch._C._ensureCUDADeviceGuardSet = ensure


def _warm_up() -> None:
    torch.set_num_threads(1)
    config = Config(model=ModelConfig(config=_TINY))
    ids = torch.ones(2, 4, dtype=torch.long)
    engine = FSDPEngine(config, device="cpu")
    # Not gloo: its threads wake up a hundred times a second, and what DTensor caches keeps them alive for ever.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported for either nccl or gloo")
            engine.initialize()
        # The first backward pass of a build for GPUs counts the devices, on a CPU model too, and those that a process
        # may use are not chosen yet: it would keep to the wrong ones. And it starts a thread for each, after which no
        # copy of the process could train.
        if torch.accelerator.current_accelerator() is None:
            engine.train_batch({"input_ids": ids, "attention_mask": ids}, next_token_loss, predicted_tokens)
        with tempfile.TemporaryDirectory() as folder:
            meta = SaveLoadMeta(f"{folder}/checkpoint")
            engine.save(meta)
            engine.load(meta)
    finally:
        dist.destroy_process_group()

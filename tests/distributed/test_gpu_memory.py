"""Pinned memory on a real GPU: copies of a moment while training goes on, and saves where nothing can be pinned."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal_ray.checkpoint import AsyncWriter, MemoryCopies, load
from areal_ray.checkpoint.tree import flatten, local
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.storage import LocalStorage
from tests.bench.steps import step_of
from tests.distributed.ranks import run_ranks
from tests.distributed.small import local_batch, start_engine

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tensors_of(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    tensors, _ = flatten({"engine": engine.state.state_dict()})
    return {name: local(tensor).detach().cpu().clone() for name, tensor in tensors.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def copies_while_training(rank: int, precision: str) -> dict[str, Any]:
    engine, said = start_engine(f"engine.precision={precision}"), []
    memory = MemoryCopies(f"gpu-{os.getpid()}", Ranks(), None, said.append, lambda: None)
    state = {"engine": engine.state}
    memory.prepare(state)
    wrong = []
    for number in range(3):
        step_of(engine, local_batch(number), memory.fence)
        moment = tensors_of(engine)
        memory.save((1, number), state, {})
        for later in range(2):
            step_of(engine, local_batch(10 + later), memory.fence)
        assert memory._last is not None
        assert memory._last.result()
        image = memory._kept.images[memory._turn]
        copied = {index.fqn: tensor for index, tensor in zip(image.where, image.tensors, strict=True)}
        wrong += differing(moment, copied)
    pinned = [image.not_pinned for image in memory._kept.images]
    memory.close()
    return {"wrong": wrong, "said": said, "pinned": pinned, "device": engine.device.type}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_copy_holds_the_state_of_its_moment(precision: str) -> None:
    (seen,) = run_ranks(copies_while_training, 1, precision, gpu=True)
    assert seen == {"wrong": [], "said": [], "pinned": [None, None], "device": "cuda"}


def saves(rank: int, root: str, can_pin: bool) -> dict[str, Any]:
    """Save while training goes on, train on, and load that again."""
    engine, said, ranks = start_engine(), [], Ranks()
    if not can_pin:
        runtime = torch.cuda.cudart()
        refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=runtime.cudaHostUnregister)
        torch.cuda.cudart = lambda: refusing  # type: ignore[assignment]
    writer, state = AsyncWriter(ranks, ranks, said.append), {"engine": engine.state}
    writer.prepare(state)
    moments, open_files = [], []
    for number in range(3):
        step_of(engine, local_batch(number), writer.fence)
        moments.append(tensors_of(engine))
        saved = writer.begin(LocalStorage(f"{root}/{number}"), state, {"step": number})
        step_of(engine, local_batch(10 + number), writer.fence)
        saved.result()
        open_files.append(len(os.listdir("/proc/self/fd")))
    wrong = []
    for number in (0, 2, 1):
        load(LocalStorage(f"{root}/{number}"), state, ranks)
        wrong += differing(moments[number], tensors_of(engine))
    writer.close()
    return {"wrong": wrong, "said": said, "open": open_files}


@pytest.mark.parametrize("can_pin", [True, False], ids=["pinned", "not pinned"])
def test_a_save_is_good_and_so_is_its_load(tmp_path: Path, can_pin: bool) -> None:
    (seen,) = run_ranks(saves, 1, str(tmp_path), can_pin, gpu=True)
    assert seen["wrong"] == []
    assert len(set(seen["open"])) == 1  # nothing more with each save
    assert len(seen["said"]) == (0 if can_pin else 1)

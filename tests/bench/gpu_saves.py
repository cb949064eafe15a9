"""The half of make bench-gpu that saves, copies and loads, and what both halves share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from areal_ray.checkpoint import AsyncWriter
from areal_ray.config import Config, load
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.storage import storage_at

from . import report
from .options import Options
from .peers import savers
from .steps import step_of

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("AREAL_RAY_BENCH_DEVICE", "cuda")
MODEL = [  # 0.13B parameters
    "model.config.vocab_size=32768",
    "model.config.hidden_size=1024",
    "model.config.intermediate_size=2816",
    "model.config.num_hidden_layers=8",
    "model.config.num_attention_heads=16",
    "model.config.num_key_value_heads=8",
    "train.seq_len=2048",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "engine.precision=bfloat16",
]
STEPS = 10
PEERS = ("dcp", "async-thread-best", "async-process-best")


def config_of(*overrides: str) -> Config:
    return load(str(ROOT / "conf/experiments/tiny.yaml"), [*MODEL, *overrides])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds, with everything that the device has to do for it."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def batch_of(config: Config) -> dict[str, torch.Tensor]:
    shape = (config.train.global_batch_size, config.train.seq_len)
    ids = torch.randint(0, config.model.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}


def engine_of(config: Config) -> FSDPEngine:
    engine = FSDPEngine(config, device=DEVICE)
    engine.initialize()
    return engine


def saves(overrides: list[str], rounds: int, folder: Path) -> list[dict]:
    """Blocked time, the ten steps after a save, time to load, and the copy to the host.

    Blocked is what the host waits for before it goes on to the next step; what goes on beside that step shows in the
    ten steps after.
    """
    config = config_of(*overrides)
    engine, batch, ranks = engine_of(config), batch_of(config), Ranks()
    writer = AsyncWriter(ranks, Ranks(dist.new_group(backend="gloo")))
    peers = {name: savers.MODES[name](engine.model, engine.optimizer) for name in PEERS}
    fences = {"areal_ray": writer.fence, **{name: peer.fence for name, peer in peers.items()}}
    fence: list[Callable[[], None]] = [lambda: None]
    ten = lambda: [step_of(engine, batch, fence[0]) for _ in range(STEPS)]  # noqa: E731
    blocked: dict[str, list[float]] = {name: [] for name in (*PEERS, "areal_ray")}
    slower: dict[str, list[float]] = {name: [] for name in blocked}
    loads: dict[str, list[float]] = {"dcp": [], "areal_ray": []}
    bandwidth: dict[str, list[float]] = {"pinned copy": [], "areal_ray": []}
    ten()
    for number in range(rounds + 1):  # the first one allocates and plans
        for name in Options.order(list(blocked), number):
            where = folder / f"{name}-{number}"
            fence[0] = fences[name]
            before = timed(ten)
            began = time.perf_counter()  # of an idle device
            if name == "areal_ray":
                manifest = writer.begin(storage_at(str(where)), {"engine": engine.state}, {"step": number})
            else:
                peers[name].save(str(where), number)
            stall = time.perf_counter() - began
            after = timed(ten)
            _ = manifest.result() if name == "areal_ray" else peers[name].settle()
            if number:
                blocked[name].append(stall)
                slower[name].append(before / after)
        rate = copies(engine, writer, folder / f"copied-{number}")
        load_dcp = timed(lambda n=number: savers.load(str(folder / f"dcp-{n}"), engine.model, engine.optimizer))
        load_ours = timed(lambda n=number: engine.load(SaveLoadMeta(str(folder / f"copied-{n}"))))
        if number:
            loads["dcp"].append(load_dcp)
            loads["areal_ray"].append(load_ours)
            for name in bandwidth:
                bandwidth[name].append(rate[name])
        for path in folder.iterdir():
            shutil.rmtree(path)
    writer.close()
    after_title = "throughput of the ten steps after a save"
    return [
        report.show("blocked time per save, one GPU", "s", blocked, "dcp"),
        report.show(after_title, "of the ten before", slower, "dcp", report.HIGHER),
        report.show("device to host", "GB/s", bandwidth, "pinned copy", report.HIGHER),
        report.show("load time, one GPU", "s", loads, "dcp"),
    ]


def copies(engine: FSDPEngine, writer: AsyncWriter, where: Path) -> dict[str, float]:
    """GB/s from the device to the host: of one pinned copy, and of a save until training may change the state."""
    held: list[torch.Tensor] = [p.to_local() for p in engine.model.parameters()]
    held += [getattr(v, "_local_tensor", v) for s in engine.optimizer.state.values() for v in s.values()]
    size = sum(t.nbytes for t in held)
    pinned = pinned_copy(size)
    synchronize()
    began = time.perf_counter()
    manifest = writer.begin(storage_at(str(where)), {"engine": engine.state}, {})
    writer.fence()
    synchronize()
    ours = time.perf_counter() - began
    manifest.result()
    return {"pinned copy": size / pinned / 1e9, "areal_ray": size / ours / 1e9}


def pinned_copy(size: int) -> float:
    """Seconds for so many bytes from the device into pinned memory that has been used before."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros(size, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    return timed(lambda: target.copy_(source, non_blocking=True))

"""Peak memory of a step that accumulates gradients, on one rank and on two, and its speed.

The peak is that of a rank's whole process (VmHWM, set back before the step) above its size before the engine was made:
parameters, optimizer's state, gradients, activations, and buffers of the collectives. There malloc gives back to the
system what is freed, so that nothing counts that an earlier step has left; speed is measured apart. So that it is about
gradients and not about activations, which no sharding makes smaller, the model has many narrow layers and a micro-batch
has few tokens.
"""

import ctypes
import time
from collections.abc import Callable
from itertools import product

import torch

from areal_ray.config import load
from areal_ray.engine import FSDPEngine
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.engine.warmup import warm_up

from ..distributed.ranks import run_ranks
from . import report
from .bounds import STEP_PEAK
from .options import Options

ARMS = tuple(f"{ranks}, {how}" for ranks, how in product(("1 rank", "2 ranks"), ("unsharded", "sharded")))
MODEL = (  # 77M parameters in 48 layers
    "model.config.hidden_size=384",
    "model.config.intermediate_size=1024",
    "model.config.num_hidden_layers=48",
    "model.config.num_attention_heads=6",
    "model.config.num_key_value_heads=3",
    "train.seq_len=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
)
STEPS = 5  # that are timed
M_MMAP_THRESHOLD = -3  # of malloc.h


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, its size now, or VmHWM, the largest that it had."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def steps(rank: int, how: str) -> Callable[[], None]:
    """A function that takes a step."""
    config = load("conf/experiments/tiny.yaml", [*MODEL, f"engine.accumulate={how}"])
    engine = FSDPEngine(config, device="cpu")
    engine.initialize()
    rows = config.train.global_batch_size // engine.dp_size
    ids = torch.randint(0, 256, (rows, config.train.seq_len), generator=torch.Generator().manual_seed(rank))
    return lambda: engine.train_batch({"input_ids": ids}, next_token_loss, predicted_tokens) and None


def peak(rank: int, how: str) -> float:
    """GB at the peak of a step."""
    warm_up()  # whatever is imported late is here before memory is looked at
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    before = memory("VmRSS")
    step = steps(rank, how)
    step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step()
    return (memory("VmHWM") - before) / 1e9


def rate(rank: int, how: str) -> float:
    """Steps per second."""
    step = steps(rank, how)
    step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS / (time.perf_counter() - began)


def run(options: Options) -> list[dict]:
    names = [name for name in ARMS if not options.only or name in options.only]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in options.order(names, number):
            ranks, how = int(name[0]), name.split(", ")[1]
            peaks[name].append(max(run_ranks(peak, ranks, how)))
            rates[name].append(min(run_ranks(rate, ranks, how)))
            report.said(name, f"{peaks[name][-1]:.3f} GB, {rates[name][-1]:.2f} steps/s")
    return [
        report.show(STEP_PEAK, "GB", peaks, ARMS[1]),
        report.show("steps that accumulate gradients", "steps/s", rates, ARMS[2], report.HIGHER),
    ]

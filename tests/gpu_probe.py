"""The facts about one GPU that the package's promises rest on; the first part of `make test-gpu`.

python -m tests.gpu_probe [fork bits copies]

Prints what it measures, and ends with status 1 if a promise is broken: a process that has warmed up, or a fork of it,
can use a GPU; with engine.deterministic the same steps give the same bits. Each measurement runs in its own process.
AREAL_RAY_BENCH_DEVICE=cpu tries the logic on a small model.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import nn

from areal_ray.checkpoint import MemoryCopies
from areal_ray.distributed import Ranks
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.engine.warmup import warm_up
from tests.bench.gpu_saves import DEVICE, batch_of, config_of, engine_of, synchronize
from tests.bench.steps import step_of
from tests.distributed.ranks import run_ranks

WARM_UP, COPY_EVERY = 2, 3
STEPS = {True: 6, False: 38}  # where the bits are not the same they drift apart, step by step
_SMALL = [  # where there is no GPU
    "model.config.num_hidden_layers=2", "model.config.hidden_size=64", "model.config.intermediate_size=64",
    "model.config.num_attention_heads=2", "model.config.num_key_value_heads=1", "model.config.vocab_size=128",
    "train.seq_len=64",
]  # fmt: skip
SIZES = ["train.micro_batch_size=4", *([] if DEVICE == "cuda" else _SMALL)]


def fork(rank: int) -> dict[str, Any]:
    """As the fork server and every standby: warm up, before a worker is told which GPU is its own, and fork."""
    warm_up()
    initialised = torch.cuda.is_initialized()
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(theirs, str(float(torch.ones(2, device=DEVICE).sum())).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with open(ours) as result:
        return {"initialised": initialised, "works": result.read() == "2.0"}


def bits(rank: int, steps: int, *overrides: str) -> dict[str, Any]:
    """Train the same steps twice."""
    config, weights, seconds = config_of(*SIZES, *overrides), [], []
    batch = batch_of(config)
    for _ in range(2):
        engine = engine_of(config)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                synchronize()
                began = time.perf_counter()
            engine.train_batch(batch, next_token_loss, predicted_tokens)
        synchronize()
        seconds.append((time.perf_counter() - began) / steps)
        weights.append(_weights(engine.model))
    one, other = weights
    distance = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    norm = sum(float(one[n].double().square().sum()) for n in one)
    same = all(torch.equal(one[name], other[name]) for name in one)
    return {"same": same, "distance": (distance / norm) ** 0.5, "s": min(seconds)}


def copies(rank: int) -> dict[str, Any]:
    """Train without copies in memory and with one every few steps."""
    config = config_of(*SIZES)
    engine, batch, ranks = engine_of(config), batch_of(config), Ranks()
    memory = MemoryCopies(f"probe{os.getpid()}", ranks, None, print, lambda: None)
    state, info = {"engine": engine.state}, {}

    def steps(count: int, first: int | None = None) -> float:
        synchronize()
        began = time.perf_counter()
        for step in range(count):
            step_of(engine, batch, memory.fence)
            if first is not None and step % COPY_EVERY == COPY_EVERY - 1:
                memory.save((1, first + step), state, info)
        synchronize()
        return (time.perf_counter() - began) / count

    steps(WARM_UP)
    memory.prepare(state)
    steps(4)  # beside which the memory is made and pinned
    began = time.perf_counter()
    memory.save((1, 0), state, info)
    seen = {"first": time.perf_counter() - began, "without": steps(12), "with": steps(12, 1)}
    memory.close()
    return seen


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.to_local().detach().cpu().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def main() -> int:
    from tests import gpu_probe  # by this name, not as __main__, ranks find the functions

    kept = []
    wanted = sys.argv[1:] or ["fork", "bits", "copies"]
    gpu = DEVICE == "cuda"
    print(f"{torch.cuda.get_device_name() if gpu else DEVICE}, torch {torch.__version__}", flush=True)
    if "fork" in wanted:
        (seen,) = run_ranks(gpu_probe.fork, 1, gpu=gpu)
        kept += [not seen["initialised"], seen["works"]]
        print(f"fork: CUDA initialised by the warm-up: {seen['initialised']}; a fork computes: {seen['works']}")
    if "bits" in wanted:
        for precision, deterministic in (("bfloat16", False), ("bfloat16", True), ("float32", True)):
            steps = STEPS[deterministic]
            how = f"engine.deterministic={deterministic}", f"engine.precision={precision}"
            (seen,) = run_ranks(gpu_probe.bits, 1, steps, *how, gpu=gpu)
            kept += [seen["same"]] if deterministic else []
            print(
                f"bits: {precision}, deterministic={deterministic}: the same {seen['same']}, "
                f"|a-b| / |a| {seen['distance']:.2g} after {WARM_UP + steps} steps, {seen['s']:.4f} s/step",
                flush=True,
            )
    if "copies" in wanted:
        (seen,) = run_ranks(gpu_probe.copies, 1, gpu=gpu)
        print(
            f"copies: first {seen['first']:.2f} s, then {seen['with']:.4f} s/step with one every {COPY_EVERY}, "
            f"{seen['without']:.4f} without"
        )
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())

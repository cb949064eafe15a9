"""make bench-gpu: the engine and its saves on one GPU, without Ray: python -m tests.bench.gpu [key=value ...]

Arms of the steps: the engine; the same transformers model in a plain loop (autocast, AdamW, torch.compile as their
documentation shows); the same in a bare FSDP2 loop, which has the engine's mixed precision. Each eager and compiled,
interleaved. FLOPs are counted as 6 a parameter and token, the embedding's lookup left out, plus causal attention;
nothing for what is computed again.

AREAL_RAY_BENCH_DEVICE=cpu tries the logic where there is no GPU; overrides then make the model small.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from areal_ray.checkpoint import AsyncWriter
from areal_ray.config import Config, load
from areal_ray.engine import FSDPEngine, SaveLoadMeta
from areal_ray.models import build_model, init_weights, materialise, shard_units
from areal_ray.objectives import next_token_loss, predicted_tokens
from areal_ray.ranks import Ranks
from areal_ray.storage import storage_at

from . import report
from .options import Options
from .peers import savers

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("AREAL_RAY_BENCH_DEVICE", "cuda")
MODEL = [  # 0.3B parameters
    "model.config.vocab_size=32768",
    "model.config.hidden_size=1024",
    "model.config.intermediate_size=2816",
    "model.config.num_hidden_layers=24",
    "model.config.num_attention_heads=16",
    "model.config.num_key_value_heads=8",
    "train.seq_len=2048",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "engine.precision=bfloat16",
]
STEPS, WARM_UP = 10, 5
PEAK = {  # dense bfloat16 TFLOP/s by what the device's name holds, from the data sheets
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "B200": 2250,
}  # fmt: skip

Step = Callable[[], object]


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


def peak_flops(given: float | None) -> float | None:
    """Of the device, per second; None if it is not known."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    tera = given or next((value for part, value in PEAK.items() if part in name), None)
    return None if tera is None else tera * 1e12


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Forward and backward."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        parameters -= c.vocab_size * c.hidden_size
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
    return 6 * parameters + attention


def batch_of(config: Config) -> dict[str, torch.Tensor]:
    shape = (config.train.global_batch_size, config.train.seq_len)
    ids = torch.randint(0, config.model.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}


def engine_of(config: Config) -> FSDPEngine:
    engine = FSDPEngine(config, device=DEVICE)
    engine.initialize()
    return engine


def _plain_model(config: Config) -> nn.Module:
    model = build_model(config.model)
    materialise(model, torch.device(DEVICE))
    init_weights(model, config.run.seed)
    return model


def _step(model: nn.Module, config: Config, batch: dict[str, torch.Tensor], autocast: bool) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"]).logits
            loss = next_token_loss(logits, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain(config: Config, batch: dict[str, torch.Tensor]) -> Step:
    model = _plain_model(config)
    if config.engine.compile:
        model.compile()
    return _step(model, config, batch, autocast=True)


def bare_fsdp2(config: Config, batch: dict[str, torch.Tensor]) -> Step:
    model = _plain_model(config)
    mesh = init_device_mesh(DEVICE, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in shard_units(model, []):
        if config.engine.compile:
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _step(model, config, batch, autocast=False)


def steps(overrides: list[str], rounds: int, peak: float | None) -> list[dict]:
    """tokens/s and model FLOP utilisation of all arms."""
    config = load(str(ROOT / "conf/experiments/tiny.yaml"), [*MODEL, *overrides])
    compiled = load(str(ROOT / "conf/experiments/tiny.yaml"), [*MODEL, *overrides, "engine.compile=true"])
    batch, run = batch_of(config), {}
    for suffix, each in (("", config), (", compiled", compiled)):
        engine = engine_of(each)
        run[f"plain loop{suffix}"] = plain(each, batch)
        run[f"bare FSDP2 loop{suffix}"] = bare_fsdp2(each, batch)
        run[f"areal_ray{suffix}"] = lambda e=engine: e.train_batch(batch, next_token_loss, predicted_tokens)
    for step in run.values():
        for _ in range(WARM_UP):
            step()
    tokens = STEPS * batch["input_ids"].numel()
    rates: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds):
        for name in Options.order(list(run), number):
            rates[name].append(tokens / timed(lambda name=name: [run[name]() for _ in range(STEPS)]))
    shown = [report.show("steady state", "tokens/s", rates, "plain loop")]
    if peak is not None:
        share = flops_per_token(engine.model, config.train.seq_len) / peak
        used = {name: [rate * share for rate in values] for name, values in rates.items()}
        shown.append(report.show("model FLOP utilisation", f"of {peak / 1e12:.0f} TFLOP/s", used, "plain loop"))
    return shown


def saves(overrides: list[str], rounds: int, folder: Path) -> list[dict]:
    """Blocked time, the ten steps after a save, time to load, and the copy to the host."""
    config = load(str(ROOT / "conf/experiments/tiny.yaml"), [*MODEL, *overrides])
    engine, batch, ranks = engine_of(config), batch_of(config), Ranks()
    writer = AsyncWriter(ranks, Ranks(dist.new_group(backend="gloo")))
    engine.before_update = writer.fence
    peers = {name: savers.MODES[name](engine.model, engine.optimizer) for name in ("dcp", "async-thread-best")}
    ten = lambda: [engine.train_batch(batch, next_token_loss, predicted_tokens) for _ in range(STEPS)]  # noqa: E731
    blocked: dict[str, list[float]] = {"dcp": [], "async-thread-best": [], "areal_ray": []}
    slower: dict[str, list[float]] = {name: [] for name in blocked}
    loads: dict[str, list[float]] = {"dcp": [], "areal_ray": []}
    bandwidth: dict[str, list[float]] = {"pinned copy": [], "areal_ray": []}
    ten()
    for number in range(rounds + 1):  # the first one allocates and plans
        for name in Options.order(list(blocked), number):
            where = folder / f"{name}-{number}"
            before = timed(ten)
            began = time.perf_counter()  # of an idle device; what the host waits for
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
    return [
        report.show("blocked time per save", "s", blocked, "dcp"),
        report.show("throughput of the ten steps after a save", "of the ten before", slower, "dcp"),
        report.show("device to host", "GB/s", bandwidth, "pinned copy"),
        report.show("load time", "s", loads, "dcp"),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the model and sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, if it is not in the list")
    parser.add_argument("--json", default="/tmp/areal_ray_bench_gpu.json", metavar="FILE")
    arguments = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and torch finds none here.", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE, f"torch {torch.__version__}")
    results = steps(arguments.overrides, arguments.rounds, peak_flops(arguments.peak_tflops))
    with tempfile.TemporaryDirectory() as folder:
        results += saves(arguments.overrides, arguments.rounds, Path(folder))
    report.write(arguments.json, results)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

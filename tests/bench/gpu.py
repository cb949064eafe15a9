"""make bench-gpu: the engine and its saves on one GPU, without Ray: python -m tests.bench.gpu [key=value ...]

Arms of the steps: the engine; the same transformers model in a plain loop (autocast, AdamW, torch.compile as their
documentation shows); the same in a bare FSDP2 loop, which has the engine's mixed precision. All eager, interleaved,
then all compiled. FLOPs are counted as 6 a parameter and token, the embedding's lookup left out, plus causal attention;
nothing for what is computed again.

AREAL_RAY_BENCH_DEVICE=cpu tries the logic where there is no GPU; overrides then make the model small.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from areal_ray.config import Config
from areal_ray.distributed.peak import peak_tflops
from areal_ray.engine.objectives import next_token_loss, predicted_tokens
from areal_ray.models import build_model, init_weights, materialise, shard_units

from . import report
from .gpu_saves import DEVICE, STEPS, batch_of, config_of, engine_of, saves, timed
from .options import Options

WARM_UP = 5
Step = Callable[[], object]


def peak_flops(given: float | None) -> float | None:
    """Of the device, per second; None if it is not known."""
    tera = given or peak_tflops(torch.cuda.get_device_name() if DEVICE == "cuda" else "")
    return None if tera is None else tera * 1e12


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Forward and backward."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        parameters -= c.vocab_size * c.hidden_size
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
    return 6 * parameters + attention


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
    """tokens/s and model FLOP utilisation of all arms, eager and then compiled."""
    shown = []
    for how, more in (("eager", []), ("compiled", ["engine.compile=true"])):
        config = config_of(*overrides, *more)
        rates, flops = steps_of(config, rounds)
        shown.append(report.show(f"steady state, {how}", "tokens/s", rates, "plain loop", report.HIGHER))
        if peak is not None:
            used = {name: [rate * flops / peak for rate in values] for name, values in rates.items()}
            unit = f"of {peak / 1e12:.0f} TFLOP/s"
            shown.append(report.show(f"model FLOP utilisation, {how}", unit, used, "plain loop", report.HIGHER))
        free()
    return shown


def steps_of(config: Config, rounds: int) -> tuple[dict[str, list[float]], float]:
    """tokens/s of three models that live as long as this call, and FLOPs a token."""
    engine, batch = engine_of(config), batch_of(config)
    run: dict[str, Step] = {
        "plain loop": plain(config, batch),
        "bare FSDP2 loop": bare_fsdp2(config, batch),
        "areal_ray": lambda: engine.train_batch(batch, next_token_loss, predicted_tokens),
    }
    for step in run.values():
        for _ in range(WARM_UP):
            step()
    tokens = STEPS * batch["input_ids"].numel()
    rates: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds):
        for name in Options.order(list(run), number):
            rates[name].append(tokens / timed(lambda name=name: [run[name]() for _ in range(STEPS)]))
    return rates, flops_per_token(engine.model, config.train.seq_len)


def free() -> None:
    """Let go of the models of before; what was compiled for them holds on to them."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the model and sizes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, if it is not in the list")
    parser.add_argument("--json", default="/tmp/areal_ray_bench_gpu.json", metavar="FILE")
    arguments = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and torch finds none here.", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(name, f"torch {torch.__version__}")
    about = report.context(device=name, overrides=arguments.overrides, rounds=arguments.rounds)
    results = steps(arguments.overrides, arguments.rounds, peak_flops(arguments.peak_tflops))
    report.write(arguments.json, results, about)
    with tempfile.TemporaryDirectory() as folder:
        results += saves(arguments.overrides, arguments.rounds, Path(folder))
    report.write(arguments.json, results, about)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

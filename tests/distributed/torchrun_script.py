"""A user's training script for torchrun, on a machine without Ray: the engine's contract and nothing else."""

import sys

sys.modules["ray"] = None  # type: ignore[assignment]  # from here on `import ray` raises ImportError

import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pkgutil  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from areal_ray.config import load  # noqa: E402
from areal_ray.engine import FSDPEngine, SaveLoadMeta  # noqa: E402

WITHOUT_RAY = [
    *("config", "storage", "run", "processes", "distributed", "data", "models", "checkpoint", "engine", "train"),
    *("tools.checkpoints", "tools.export"),
]


def loss_fn(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def loss_weight_fn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["attention_mask"][:, 1:].sum()


def main(config: str, out: str, *overrides: str) -> None:
    for name in WITHOUT_RAY:
        module = importlib.import_module(f"areal_ray.{name}")
        for _, inside, _ in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"areal_ray.{name}.{inside}")
    engine = FSDPEngine(load(config, overrides))
    engine.initialize()
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    input_ids = torch.randint(0, 264, (4, 32), generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    stats = [engine.train_batch(batch, loss_fn, loss_weight_fn) for _ in range(3)]
    before = engine.eval_batch(batch, loss_fn, loss_weight_fn)
    for weight_format in ("dcp", "hf"):
        engine.save(SaveLoadMeta(f"{out}/{weight_format}", weight_format, with_optim=True))
    went_on = [before, *(engine.train_batch(batch, loss_fn, loss_weight_fn) for _ in range(2))]
    again = []
    for weight_format in ("dcp", "hf"):
        engine.load(SaveLoadMeta(f"{out}/{weight_format}", weight_format, with_optim=True))
        after = engine.eval_batch(batch, loss_fn, loss_weight_fn)
        again.append([after, *(engine.train_batch(batch, loss_fn, loss_weight_fn) for _ in range(2))])
    logits = engine.forward(batch)
    result = {
        "losses": [float(step["loss"]) for step in stats],
        "keys": sorted(stats[0]),
        "went on": [float(step["loss"]) for step in went_on],
        "goes on": [[float(step["loss"]) for step in steps] for steps in again],
        "logits": list(logits.shape),
        "world_size": dist.get_world_size(),
        "ray": sorted(name for name, module in sys.modules.items() if name.split(".")[0] == "ray" and module),
    }
    Path(out, f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])

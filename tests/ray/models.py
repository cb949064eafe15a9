"""Models that do at a certain place what a test is about, and are else the one of the tier, to the bit."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from areal_ray.cli.main import main as run_cli
from areal_ray.config import ModelConfig
from areal_ray.models import build_model

from .conftest import EXPERIMENT, Run

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def train(run: Run, factory: str, *overrides: str, **args: Any) -> int:
    """Train as `run` does, with a model from here."""
    values = yaml.safe_load(Path(EXPERIMENT).read_text())
    del values["defaults"]
    values["model"] = {"factory": f"{__name__}:{factory}", "args": args}
    experiment = run.path.with_suffix(".yaml")
    experiment.write_text(yaml.safe_dump(values))
    arguments = [argument for argument in run.arguments if not argument.startswith("model.")]
    return run_cli(["train", "--config", str(experiment), *arguments, *overrides])


def slow(folder: str, calls: int) -> nn.Module:
    """Takes a second for each of the first `calls` batches and waits in the next, until there is a file `folder`/go.

    Leaves a file `folder`/`pid` for every process that computes.
    """
    go, count = Path(folder, "go"), 0

    def wait(*_: Any) -> None:
        nonlocal count
        Path(folder, str(os.getpid())).touch()
        count += 1
        while not go.exists():
            threading.Event().wait(1.0)
            if count <= calls:
                break

    return _with_hook(wait)


def poisoned(folder: str, calls: int) -> nn.Module:
    """Cannot take the batch with which it is called after `calls` others, whenever it comes again, on whatever rank."""
    known, count = Path(folder, "poison"), 0

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        count += 1
        mine = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        if count == calls + 1 and not known.exists() and torch.distributed.get_rank() == 1:
            known.write_text(mine)
        if known.exists() and known.read_text() == mine:
            raise ValueError("a batch that this model cannot take")

    return _with_hook(look)


def slow_on_rank_1(seconds: float) -> nn.Module:
    """Takes longer within each layer on the second rank."""
    model = build_model(ModelConfig(config=CONFIG))

    def wait(*_: Any) -> None:
        if torch.distributed.get_rank() == 1:
            threading.Event().wait(seconds)

    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(wait)  # type: ignore[operator,union-attr]
    return model


def _with_hook(hook: Any) -> nn.Module:
    model = build_model(ModelConfig(config=CONFIG))
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model

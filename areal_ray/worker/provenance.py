"""Provenance of a checkpoint for its manifest, and the note of where a run begins or goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import ray
import torch
import transformers

from areal_ray import __version__, models
from areal_ray.checkpoint import Catalog, Copy, StoredState
from areal_ray.cluster.console import say
from areal_ray.config import Config, RunConfig, dump, redact
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine
from areal_ray.run import RunDir
from areal_ray.train import loop
from areal_ray.worker.receipt import receipt


def provenance(config: Config) -> dict[str, Any]:
    """Provenance for the manifest: config, its hash, model, tokenizer and versions."""
    # An experiment with another name, place, fault or end of this invocation has the same hash.
    lasting = dataclasses.replace(
        config,
        run=RunConfig(seed=config.run.seed),
        train=dataclasses.replace(config.train, stop_at=None),
        faults=[],
    )
    versions = {"areal_ray": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {
        "config": redact(dataclasses.asdict(config)),
        "seed": config.run.seed,
        "model": redact(dataclasses.asdict(config.model)),
        "hf_config": models.architecture(config.model),
        "tokenizer": config.data.tokenizer,
        "config_hash": hashlib.sha256(dump(lasting).encode()).hexdigest()[:16],
        "versions": {**versions, "transformers": transformers.__version__},
    }


def announce(
    run: RunDir, attempt: int, restored: Copy | str | None, job: loop.Job, engine: FSDPEngine, ranks: Ranks
) -> None:
    """Take back on rank 0 what is computed again, and say where the run goes on.

    Args:
        restored: a copy in memory, the name of a checkpoint, or None: there was neither.

    Raises:
        RankError: if the receipt of a restore contradicts itself.
    """

    def work() -> None:
        parameters = sum(p.numel() for p in engine.model.parameters())
        what = (
            f"{parameters / 1e6:.1f}M parameters on {ranks.size} {engine.device.type} worker{'s' * (ranks.size != 1)}"
        )
        step = job.progress.step
        # The beginning has a line too, that of step 0.
        reached = run.rewind(step if restored else -1, job.progress.samples)
        if restored is None:
            run.note("started", say, attempt=attempt, step=0, reached=reached)
            say(f"attempt {attempt}: {what}, from the beginning")
            return
        where: dict[str, str | None]
        if isinstance(restored, Copy):
            name = Catalog.name(restored.version[1], restored.version[0])
            where, text = {"checkpoint": None, "memory": name}, f"step {step} from memory"
        else:
            where, text = {"checkpoint": restored}, restored
        stored = restored if isinstance(restored, Copy) else StoredState(Catalog(run.storage).directory(restored))
        compared = receipt(stored.values, stored.info, job.recover.values(), job.recover.info)
        run.note("restored", say, attempt=attempt, step=step, reached=reached, **where, **compared.event())
        say(f"attempt {attempt}: {what}, restored {text}, going on with step {step + 1}")
        for line in compared.text().splitlines():
            say(line)

    ranks.on_rank_zero(work)

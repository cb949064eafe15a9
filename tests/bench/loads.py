"""Load time at the same and at another world size: saved once by two ranks, loaded by two and by one, interleaved.

Arms: `dcp` is dcp.load into the sharded state, as the tutorials show; `full` reads a torch.save of the full state on
rank 0 and broadcasts it; `areal_ray` is the engine's load, which compares every chunk with its checksum. No Ray: all
run under torchrun, in the same processes, on the same model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import arms, report
from .launch import ROOT, environment, run_folder
from .options import Options

ARMS = ("dcp", "full", "areal_ray")


def run(options: Options) -> list[dict]:
    shown = []
    with run_folder() as folder:
        _torchrun(2, folder, "save", 1)
        for ranks, what in ((2, "the same"), (1, "another")):
            _torchrun(ranks, folder, "load", options.rounds)
            seconds = json.loads((folder / "seconds.json").read_text())
            shown.append(
                report.show(f"load time at {what} world size (saved by 2, loaded by {ranks})", "s", seconds, "dcp")
            )
    return shown


def _torchrun(ranks: int, folder: Path, what: str, rounds: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = ["-m", "tests.bench.loads", str(folder), what, str(rounds)]
    done = subprocess.run(
        [sys.executable, *launcher, *script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def main(folder: str, what: str, rounds: int) -> None:
    """One rank: save in all ways, or load in all ways and let rank 0 write down the seconds."""
    import torch
    import torch.distributed as dist

    from areal_ray.config import load
    from areal_ray.engine import FSDPEngine, SaveLoadMeta
    from areal_ray.engine.objectives import next_token_loss, predicted_tokens

    from .peers import savers

    config = load(str(ROOT / arms.EXPERIMENT), [*arms.LARGER, "train.global_batch_size=2"])
    engine = FSDPEngine(config, device="cpu")
    engine.initialize()
    ids = torch.ones(1, 16, dtype=torch.long)
    engine.train_batch({"input_ids": ids, "attention_mask": ids}, next_token_loss, predicted_tokens)
    model, optimizer = engine.model, engine.optimizer
    if what == "save":
        savers.Sync(model, optimizer).save(f"{folder}/dcp", 1)
        savers.Full(model, optimizer).save(f"{folder}/full", 1)
        engine.save(SaveLoadMeta(f"{folder}/areal_ray"))
    else:
        ways: dict[str, Callable[[], object]] = {
            "dcp": lambda: savers.load(f"{folder}/dcp", model, optimizer),
            "full": lambda: savers.load(f"{folder}/full", model, optimizer),
            "areal_ray": lambda: engine.load(SaveLoadMeta(f"{folder}/areal_ray")),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):  # the first one warms up
            for name in Options.order(list(ways), number):
                dist.barrier()
                began = time.perf_counter()
                ways[name]()
                dist.barrier()
                if number:
                    seconds[name].append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

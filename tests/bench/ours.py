"""areal_ray as its own command runs it, with the peers' step log: python -m tests.bench.ours --config FILE key=value

In place of jobs/train.py. The only difference is in the workers: a hook of PyTorch's optimizers writes the line of
every step that changed the weights, as the peers' loops do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LOG = "log"  # beside the run.storage_path


def main(*arguments: Any) -> Any:
    """What the driver has its workers run: the worker's own main."""
    from areal_ray.worker import main

    note_steps(Path(arguments[0].run.storage_path).parent / LOG)
    return main.main(*arguments)


def note_steps(folder: Path) -> None:
    import torch.distributed as dist
    from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

    from tests.bench.peers.common import StepLog

    log = StepLog(folder, dist.get_rank())

    def note(optimizer: Optimizer, *_: Any) -> None:
        if optimizer.param_groups[0]["lr"] == 0.0:  # the engine makes the optimizer's state by a step that is none
            return
        log.step(int(next(iter(optimizer.state.values()))["step"]))

    register_optimizer_step_post_hook(note)


def drive(*arguments: Any) -> int:
    """What the command does when it has started what it starts first."""
    from areal_ray.driver import supervisor

    assert supervisor._WORKER == "areal_ray.worker.main"
    supervisor._WORKER = "tests.bench.ours"
    return own_drive(*arguments)


if __name__ == "__main__":
    from areal_ray.cli import main as cli

    own_drive, cli._drive = cli._drive, drive
    sys.exit(cli.main(["train", *sys.argv[1:]]))

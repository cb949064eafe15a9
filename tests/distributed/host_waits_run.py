"""Steps of the real loop with a real engine, and what the host reads of the device meanwhile."""

from __future__ import annotations

import sys
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from areal_ray.engine.scalars import Reading
from tests.distributed.bad_numbers_run import Run

FIRST, LAST = 4, 10  # of the steps that are counted: before them everything lazy has happened
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")


class Reads(TorchFunctionMode):
    """Counts what would wait for a device, by the place in the package (or in transformers) that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (resolve_name(function) or "").rpartition(".")[2] in READS:
            self.seen.append(place())
        return function(*args, **(kwargs or {}))


def place() -> str:
    """The innermost line that is neither torch's nor this module's."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}"


class Watched(Run):
    """Notes between which steps what is read, and which step's numbers the host has waited for by the next one."""

    def __init__(self, root: str, *overrides: str) -> None:
        quiet = ["checkpoint.every_steps=null", "checkpoint.memory_every_steps=null", "logging.every_steps=100"]
        super().__init__(root, f"train.steps={LAST + 2}", "train.micro_batch_size=2", *quiet, *overrides)
        self.order: list[str] = []
        self.seen: list[str] = []

    def before_step(self, step: int) -> None:
        self.order.append(f"step {step}")

    def watch(self) -> None:
        """Note forward passes, updates and readings of the run in `order`."""
        engine, values, order = self.engine, Reading.values, self.order
        step = engine.optimizer_step

        def update(*args: Any) -> None:
            step(*args)
            order.append("update")

        def read(reading: Reading) -> list[float]:
            order.append("read")
            return values(reading)

        engine.optimizer_step = update  # type: ignore[method-assign]
        Reading.values = read  # type: ignore[method-assign]

    def counted(self) -> list[str]:
        """What happened in the counted steps."""
        return self.order[self.order.index(f"step {FIRST}") : self.order.index(f"step {LAST}")]


def on_cpu(rank: int, root: str, *overrides: str) -> dict[str, Any]:
    """Every read of a tensor by the host."""
    run = Watched(root, *overrides)
    run.watch()
    with Reads() as reads:
        before = run.before_step

        def before_step(step: int) -> None:
            before(step)
            if step in (FIRST, LAST):
                run.seen, reads.seen = reads.seen, []

        run.before_step = before_step  # type: ignore[method-assign]
        run.train()
    return {"order": run.counted(), "reads": run.seen}


def on_gpu(rank: int, root: str, *overrides: str) -> dict[str, Any]:
    """torch's own warnings of waits, and the batches that were made ahead."""
    stand_in_for_grain()
    run = Watched(root, *overrides)
    run.watch()
    before = run.before_step

    def before_step(step: int) -> None:
        before(step)
        if step == LAST:
            torch.cuda.set_sync_debug_mode("default")
        if step == FIRST:
            torch.cuda.set_sync_debug_mode("warn")

    run.before_step = before_step  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    weights, guard, _ = run.standing()
    finite = all(bool(weight.isfinite().all()) for weight in weights.values())
    maker = type(run.job.batches._maker).__name__
    return {"order": run.counted(), "waits": waits, "guard": guard, "finite": finite, "maker": maker}


def prefetched(rank: int, batches: int = 20) -> tuple[list[int], list[int]]:
    """Sums of batches that were made ahead, read by a main stream that is late; and those of the same on the CPU."""
    stand_in_for_grain()
    from areal_ray.data import GlobalBatches, PackedTokens

    data = PackedTokens(np.random.default_rng(0).integers(0, 1 << 30, 64 * 4096), 4096)
    ahead, plain = (GlobalBatches(data, 0, 8, 0, 1, device) for device in ("cuda", "cpu"))
    sums = []
    for _ in range(batches):
        batch = next(ahead)
        torch.cuda._sleep(20_000_000)  # cycles: by then the batch is let go of, and the next ones are copied
        sums.append(batch["input_ids"].sum())
        del batch
    ahead.close()
    return [int(each) for each in sums], [int(next(plain)["input_ids"].sum()) for _ in range(batches)]


def stand_in_for_grain() -> None:
    """Where grain is not installed: indices in order instead of shuffled, which is all one to what is tested."""
    try:
        import grain.python
    except ImportError:

        class InOrder:
            def __init__(self, count: int) -> None:
                self.count = count

            def seed(self, seed: int) -> InOrder:
                return self

            shuffle = repeat = lambda self: self

            def __getitem__(self, n: int) -> int:
                return n % self.count

        absl, logging = types.ModuleType("absl"), types.ModuleType("absl.logging")
        absl.logging, logging.ERROR = logging, 0  # type: ignore[attr-defined]
        logging.set_verbosity = lambda level: None  # type: ignore[attr-defined]
        grain, python = types.ModuleType("grain"), types.ModuleType("grain.python")
        grain.python = python  # type: ignore[attr-defined]
        python.MapDataset = types.SimpleNamespace(range=InOrder)  # type: ignore[attr-defined]
        sys.modules |= {"absl": absl, "absl.logging": logging, "grain": grain, "grain.python": python}

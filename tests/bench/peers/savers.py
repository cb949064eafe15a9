"""Ways to save model and optimizer with what PyTorch has, as its tutorials show them."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.stateful import Stateful

FULL = "full.pt"


class AppState(Stateful):
    """As in Ray's FSDP2 tutorial and PyTorch's recipe for DCP."""

    def __init__(self, model: Any, optimizer: Any, epoch: int = 0) -> None:
        self.model, self.optimizer, self.epoch = model, optimizer, epoch

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.epoch = state["epoch"]


class Sync:
    """dcp.save, straight to the final place."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def save(self, folder: str, epoch: int) -> None:
        dcp.save({"app": AppState(self._model, self._optimizer, epoch)}, checkpoint_id=folder)

    def fence(self) -> None:
        """To be called before the optimizer's next step: waits until the state may change."""

    def settle(self) -> None:
        """Wait until everything is written."""


class Async(Sync):
    """dcp.async_save, as its recipe shows: at most one under way, the one before is waited for.

    Args:
        process: writes in a process instead of a thread.
        best: keep one staging buffer in shared memory (by default every call allocates another), pinned on a GPU, and
            copy in the background until `fence`.
    """

    def __init__(self, model: Any, optimizer: Any, process: bool, best: bool) -> None:
        super().__init__(model, optimizer)
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        # One for its own: collectives of the background must not meet those of training.
        self._group = dist.new_group(backend="gloo")
        on_gpu = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=on_gpu
        )
        self._stager = DefaultStager(options) if best else None
        self._staged: Future | None = None
        self._last: Future | None = None

    def save(self, folder: str, epoch: int) -> None:
        self.settle()
        answer = dcp.async_save(
            {"app": AppState(self._model, self._optimizer, epoch)},
            checkpoint_id=folder,
            process_group=self._group,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        if isinstance(answer, Future):
            self._last = answer
        else:
            self._staged, self._last = answer.staging_completion, answer.upload_completion

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def settle(self) -> None:
        self.fence()
        if self._last is not None:
            self._last.result()
            self._last = None


class Full(Sync):
    """torch.save of the full state, gathered on rank 0."""

    def save(self, folder: str, epoch: int) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "model": get_model_state_dict(self._model, options=options),
            "optim": get_optimizer_state_dict(self._model, self._optimizer, options=options),
            "epoch": epoch,
        }
        if dist.get_rank() == 0:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            torch.save(state, path / "part")
            os.replace(path / "part", path / FULL)
        dist.barrier()


MODES = {
    "dcp": Sync,
    "async-thread": lambda m, o: Async(m, o, process=False, best=False),
    "async-thread-best": lambda m, o: Async(m, o, process=False, best=True),
    "async-process": lambda m, o: Async(m, o, process=True, best=False),
    "async-process-best": lambda m, o: Async(m, o, process=True, best=True),
    "full": Full,
}


def load(folder: str, model: Any, optimizer: Any) -> int:
    """Load what any of them wrote; its epoch."""
    if (Path(folder) / FULL).exists():
        first = dist.get_rank() == 0
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = torch.load(Path(folder) / FULL, map_location="cpu", mmap=True) if first else {}
        set_model_state_dict(model, state.get("model", {}), options=options)
        set_optimizer_state_dict(model, optimizer, state.get("optim", {}), options=options)
        epoch = torch.tensor(state.get("epoch", 0))
        dist.broadcast(epoch, 0)
        return int(epoch)
    app = AppState(model, optimizer)
    dcp.load({"app": app}, checkpoint_id=folder)
    return app.epoch

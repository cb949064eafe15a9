"""Injection of faults, to see with one's own eyes that a run survives them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from areal_ray.config import Fault
from areal_ray.distributed import Ranks
from areal_ray.engine import Batch, FrozenModel, Objective
from areal_ray.run import RunDir


class FaultInjected(RuntimeError):
    """The `exception` kind of fault."""


class Faults:
    """Injects the configured faults, each once in the life of the run: those that have happened stand in its ledger.

    Args:
        faults: what is to happen.
        run: the run directory.
        ranks: all ranks.
    """

    def __init__(self, faults: Sequence[Fault], run: RunDir, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        happened: set[str] = (
            ranks.on_rank_zero(lambda: {event["fault"] for event in run.events("fault")}) if faults else set()
        )
        self._ahead = {str(fault): fault for fault in faults if str(fault) not in happened}
        self._spoil = False

    def before_step(self, step: int) -> None:
        """Called by every rank before it computes a step, counted from 1."""
        self._spoil = False
        due = [(key, fault) for key, fault in self._ahead.items() if fault.step == step]
        for key, fault in due:
            del self._ahead[key]
            # Written down before it happens, by a rank that waits for nobody, and seen to be written by all.
            self._ranks.on_rank_zero(lambda key=key, fault=fault: self._run.event("fault", fault=key, step=fault.step))  # type: ignore[misc]
            if fault.rank != self._ranks.rank:
                continue
            if fault.kind == "nan":
                self._spoil = True
            else:
                _happen(fault)

    def spoiling(self, objective: Objective) -> Objective:
        """The objective, but for the step of a `nan` fault: there its loss and all gradients are NaN."""
        return _Spoiled(objective, lambda: self._spoil)


class _Spoiled(Objective):
    """Another objective, whose loss is NaN in training (not in evaluation) while `spoil` says so."""

    def __init__(self, objective: Objective, spoil: Callable[[], bool]) -> None:
        self._objective, self._spoil = objective, spoil
        self.references, self.metrics = objective.references, objective.metrics
        self.reference_models, self.takes_hidden = objective.reference_models, objective.takes_hidden
        self.once = objective.once

    def prepare(self, batch: Batch, models: Mapping[str, FrozenModel]) -> Batch:
        return self._objective.prepare(batch, models)

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return self._objective.model_inputs(batch)

    def weight(self, batch: Batch) -> torch.Tensor | float:
        return self._objective.weight(batch)

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss, metrics = self._objective.loss(output, batch)
        return loss * torch.nan if self._spoil() and torch.is_grad_enabled() else loss, metrics


def _happen(fault: Fault) -> None:
    signals = {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP, "sigsegv": signal.SIGSEGV}
    if fault.kind in signals:
        os.kill(os.getpid(), signals[fault.kind])
        return  # a stopped process may be told to go on
    if fault.kind == "hang":
        threading.Event().wait()
    if fault.kind == "exit":
        os._exit(17)
    raise FaultInjected(f"the configured fault: an exception on rank {fault.rank} before step {fault.step}")

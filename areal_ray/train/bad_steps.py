"""Bad steps: a step's loss and gradient norm are judged between its gradients and its update.

With `train.bad_step.lag: 1` the device judges, and the host reads what it said a step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median
from typing import Any, Literal

import torch

from areal_ray.config import BadStepConfig
from areal_ray.engine.base import StepResult, finite
from areal_ray.engine.scalars import Reading

Verdict = Literal["take", "skip", "rollback"]


class BadStepError(RuntimeError):
    """The numbers of a step are bad, and the run is to stop; says which step, what was bad and how to go on."""


@dataclass(frozen=True)
class Refusal:
    """A step that must not change the weights.

    Args:
        step: counted from 1.
        loss, grad_norm: its numbers, over the global batch.
        reason: what is wrong with them.
        action: what follows.
        samples: its batch, as a range of the data's cursor.
    """

    step: int
    loss: float
    grad_norm: float
    reason: str
    action: Literal["stop", "skip", "rollback"]
    samples: range


@dataclass(frozen=True)
class Update:
    """Whether a step's update is `wanted`; if so, what `TrainEngine.optimizer_step` is to be told of it: `refused`."""

    wanted: bool
    refused: torch.Tensor | None = None


@dataclass(frozen=True)
class Judged:
    """A step whose verdict the host knows.

    Args:
        step: counted from 1.
        verdict: take: the weights have changed; skip: they have not; rollback: nor have they, and the run is to go
            back to its last checkpoint.
        values: its numbers by name, loss and grad_norm first; empty if it was not computed.
    """

    step: int
    verdict: Verdict
    values: dict[str, float]


@dataclass(frozen=True)
class _Pending:
    """A step whose verdict the host does not know yet; `reading` is None if it was not computed."""

    step: int
    samples: range
    names: Sequence[str] = ()
    reading: Reading | None = None


class BadStepPolicy:
    """Decides which steps may change the weights, and what follows from one that may not.

    All ranks ask with the same numbers, which are sums over all of them, and so decide alike without a word. A step
    that was refused once is refused for good: a run that goes back behind it, or starts again, leaves its batch out
    when it comes there, even if the numbers are good this time.

    With a lag of 0, `judge` reads the numbers and decides. With a lag of 1 it only queues: the device decides by the
    same rule, a refused update changes nothing, and the step after it begins with the weights that it would have had
    anyway. What the host does about it comes a step late: the record, a stop (the step after it is lost with it), a way
    back (if the step after it is bad, too, both are left out in one go). Nothing may be saved or shown of a step before
    `settle(now=True)`, so no checkpoint rests on a verdict that is not recorded. Only a rank that dies within that step
    takes the refusal with it: the next attempt computes the step afresh.

    Going back and leaving out what led to a spike is how PaLM was trained (Chowdhery et al., 2022, section 5.1).

    Args:
        config: what is bad, and what to do.
        known: steps that earlier attempts have left out.
        on_bad_step: called with a refusal, once for each step, before anything follows from it.
    """

    def __init__(self, config: BadStepConfig, known: Iterable[int], on_bad_step: Callable[[Refusal], None]) -> None:
        self._config, self._on_bad_step = config, on_bad_step
        self._left_out = set(known)
        self._losses: deque[float] = deque(maxlen=config.spike_window)  # of the last steps that counted
        self._rule = _DeviceRule(config) if config.lag else None
        self._pending: deque[_Pending] = deque()
        self._judged: list[Judged] = []

    def is_skipped(self, step: int) -> bool:
        """Whether `step` was refused before, or its batch is known to end the run; it need not be computed."""
        return step in self._left_out

    def judge(self, step: int, result: StepResult | None, samples: range) -> Update:
        """Decide on a step whose gradients are there and whose update is not; to be asked once for each.

        Args:
            step: counted from 1.
            result: its numbers, over the global batch; None: it was skipped.
            samples: its batch, as a range of the data's cursor.

        Raises:
            BadStepError: if the run is to stop; with a lag of 1, `settle` does.
        """
        if result is None:
            self._pending.append(_Pending(step, samples))
            update = Update(wanted=False)
        else:
            scalars = result.scalars()
            refused = self._rule.refused(result.loss, result.grad_norm) if self._rule else None
            reading = Reading([*scalars.values(), *([] if refused is None else [refused])])
            self._pending.append(_Pending(step, samples, tuple(scalars), reading))
            update = Update(True, refused)
        if self._rule is None:
            self._judged.append(self._conclude(self._pending.popleft()))
            update = Update(self._judged[-1].verdict == "take")
        return update

    def settle(self, now: bool) -> list[Judged]:
        """The steps whose verdicts have become known since the last call, in order.

        Args:
            now: wait for all of them; else those of the last `lag` steps are left open. Where one step sends the run
                back, those after it are settled with it.

        Raises:
            BadStepError: if the run is to stop.
        """
        while len(self._pending) > (0 if now else self._config.lag):
            self._judged.append(self._conclude(self._pending.popleft()))
            now = now or self._judged[-1].verdict == "rollback"
        known, self._judged = self._judged, []
        return known

    def _conclude(self, pending: _Pending) -> Judged:
        """The verdict on a step, after what follows from it has been recorded."""
        if pending.reading is None:
            return Judged(pending.step, "skip", {})
        numbers = pending.reading.values()
        values = dict(zip(pending.names, numbers, strict=False))
        loss, grad_norm = values["loss"], values["grad_norm"]
        problem = self._problem(loss, grad_norm)
        assert self._rule is None or bool(numbers[-1]) == bool(problem), f"host and device disagree on {pending.step}"
        if not problem:
            self._losses.append(loss)
            return Judged(pending.step, "take", values)
        full = len(self._left_out) >= self._config.max_bad_steps
        action = "stop" if full else self._config.on_bad
        refusal = Refusal(pending.step, loss, grad_norm, problem, action, pending.samples)
        self._on_bad_step(refusal)
        if refusal.action == "stop":
            raise BadStepError(self._sentence(refusal, full))
        self._left_out.add(pending.step)
        return Judged(pending.step, refusal.action, values)

    def _problem(self, loss: float, grad_norm: float) -> str:
        """The reason why these numbers are bad; "" if they are good."""
        if not finite(loss, grad_norm):
            return "not finite"
        factor, window = self._config.spike_factor, self._config.spike_window
        if factor is None or len(self._losses) < window:
            return ""
        usual = median(self._losses)
        # Of a loss that may be 0 or less, a multiple says nothing.
        return f"a spike: the median was {usual:.4g}" if 0 < usual * factor < loss else ""

    def _sentence(self, refusal: Refusal, full: bool) -> str:
        what = f"step {refusal.step}: loss {refusal.loss:.4g}, gradient norm {refusal.grad_norm:.4g} ({refusal.reason})"
        if full:
            limit = self._config.max_bad_steps
            return (
                f"{what}, after {len(self._left_out)} bad steps that were left out already. The data, optim.lr or "
                f"engine.precision may be the reason; the same command with train.bad_step.max_bad_steps above {limit} "
                "goes on from the last checkpoint"
            )
        return (
            f"{what}; it was not taken. The same command goes on from the last checkpoint: with "
            "train.bad_step.on_bad=skip without this step's batch, as it is to see whether it happens again"
        )

    def state_dict(self) -> dict[str, Any]:
        assert not self._pending, "a state between a step and its verdict"
        return {"losses": list(self._losses), "left_out": sorted(self._left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; steps that were left out since then still are."""
        self._losses.clear()
        self._losses.extend(state.get("losses", []))  # absent from checkpoints that are older than this class
        self._left_out.update(state.get("left_out", []))
        if self._rule is not None:
            self._rule.restart(self._losses)


class _DeviceRule:
    """The rule of a BadStepPolicy in operations of the device, to the same verdict.

    Losses are float32 on both sides, and the arithmetic with them is float64 in the same order.

    Args:
        config: what is bad.
    """

    def __init__(self, config: BadStepConfig) -> None:
        self._factor, self._size = config.spike_factor, config.spike_window
        self.restart(())

    def restart(self, losses: Iterable[float]) -> None:
        """Begin with these losses of steps that counted."""
        self._losses = list(losses)
        self._window: torch.Tensor | None = None  # the newest last; nan before there are so many

    def refused(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1 if a step with these numbers is bad, else 0: a float32 scalar on their device. Waits for nothing."""
        loss = loss.detach().double()
        good = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if self._factor is not None:
            if self._window is None:
                missing = [nan] * (self._size - len(self._losses))
                self._window = torch.tensor(missing + self._losses, dtype=torch.float64, device=loss.device)
            window = self._window
            ordered, full = window.sort().values, torch.isfinite(window[0])
            limit = (ordered[(self._size - 1) // 2] + ordered[self._size // 2]) / 2 * self._factor
            good &= ~(full & (limit > 0) & (loss > limit))
            self._window = torch.where(good, torch.cat([window[1:], loss[None]]), window)
        return (~good).float()

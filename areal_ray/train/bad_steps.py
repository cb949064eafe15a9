"""Bad steps: a step's loss and gradient norm are judged between its gradients and its update."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from areal_ray.config import BadStepConfig
from areal_ray.engine.base import finite

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
    """

    step: int
    loss: float
    grad_norm: float
    reason: str
    action: Literal["stop", "skip", "rollback"]


class BadStepPolicy:
    """Decides which steps may change the weights, and what follows from one that may not.

    All ranks ask with the same numbers, which are sums over all of them, and so decide alike without a word. A step
    that was refused once is refused for good: a run that goes back behind it, or starts again, leaves its batch out
    when it comes there, even if the numbers are good this time.

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

    def is_skipped(self, step: int) -> bool:
        """Whether `step` was refused before, or its batch is known to end the run; it need not be computed."""
        return step in self._left_out

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Decide on a step whose gradients are there and whose update is not; to be asked once for each.

        Args:
            step: counted from 1.
            loss, grad_norm: its numbers, over the global batch.

        Returns:
            take: the weights may change; skip: they may not; rollback: the run is to go back to its last checkpoint.

        Raises:
            BadStepError: if it is to stop.
        """
        problem = self._problem(loss, grad_norm)
        if not problem:
            self._losses.append(loss)
            return "take"
        full = len(self._left_out) >= self._config.max_bad_steps
        refusal = Refusal(step, loss, grad_norm, problem, "stop" if full else self._config.on_bad)
        self._on_bad_step(refusal)
        if refusal.action == "stop":
            raise BadStepError(self._sentence(refusal, full))
        self._left_out.add(step)
        return refusal.action

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
        return {"losses": list(self._losses), "left_out": sorted(self._left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; steps that were left out since then still are."""
        self._losses.clear()
        self._losses.extend(state.get("losses", []))  # absent from checkpoints that are older than this class
        self._left_out.update(state.get("left_out", []))

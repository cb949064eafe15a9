"""A loss without the logits: of what a model computes before its output layer, some rows at a time.

What is computed of a chunk of logits, and how, stands in chunked/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from areal_ray.config import Config, ConfigError
from areal_ray.engine.chunked import ChunkedLogProbs, ChunkedSums, CrossEntropyRows, DistilledRows, RowLoss

Loss = Literal["logits", "chunked"]

CHUNK_BYTES = 128 << 20  # of float32 logits that there are at a time
LARGE_BYTES = 256 << 20  # of float32 logits of a micro-batch, from which on there are never all of them


def choose(config: Config, vocabulary: int, why_not: str | None, recorded: Loss | None = None) -> Loss:
    """How a run computes its loss: what the configuration says, or else a choice for the run's whole life.

    The two differ in the last bits, so `auto` depends on nothing that a restart may change.

    Args:
        config: model.loss and the sizes in train are read.
        vocabulary: columns of the logits.
        why_not: why the model cannot do without logits; None if it can.
        recorded: the choice of the checkpoint that the run goes on from.

    Raises:
        ConfigError: if the model cannot do what the configuration says.
    """
    said = config.model.loss
    if said == "chunked" and why_not is not None:
        raise ConfigError("model.loss", f"chunked is not for this model: {why_not}")
    if why_not is not None:
        return "logits"
    if said != "auto":
        return said
    if recorded is not None:
        return recorded
    rows = config.train.micro_batch_size * config.train.seq_len
    return "chunked" if 4 * rows * vocabulary >= LARGE_BYTES else "logits"


@dataclass(frozen=True)
class Hidden:
    """The input of a model's output layer, and that layer: the logits are `finish(states @ weight.T + bias)`.

    Args:
        states: (B, S, width).
        weight: (vocabulary, width), whole, in the precision of the computation.
        bias: (vocabulary), or None.
        finish: scales or caps logits of any rows (1, rows, vocabulary), has no parameters; None: nothing.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cross_entropy(self, labels: torch.Tensor, ignored: int = -100) -> torch.Tensor:
        """The sum of the cross entropies of the tokens that are to be predicted, in nats, in float32.

        Its memory grows with the states and the weight, whose gradients are made in the forward pass, and not with
        their product. The logits are those of the model, in its precision; a chunk of them is float32 for the softmax.

        torch has had `linear_cross_entropy`, which does the same, since 2.13; with bfloat16 states it gives the loss in
        bfloat16, too, of which three digits are right.

        Args:
            labels: (B, S), `ignored` where nothing is predicted.
            ignored: that label.
        """
        return self._sums(CrossEntropyRows(labels.flatten(), ignored))[0]

    @torch.no_grad()
    def logits_at(self, positions: torch.Tensor) -> torch.Tensor:
        """The logits (B, vocabulary) of one position of each row, which (B) says."""
        states = self.states[torch.arange(len(positions), device=self.states.device), positions]
        logits = torch.nn.functional.linear(states, self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits[None])[0]

    @torch.no_grad()
    def correct(self, labels: torch.Tensor, ignored: int = -100) -> torch.Tensor:
        """How many of the tokens that are to be predicted have the largest logit, in chunks of rows.

        A second product with the weight: it is for evaluation only.

        Args:
            labels: (B, S), `ignored` where nothing is predicted.
            ignored: that label.
        """
        rows, targets = self.states.flatten(0, -2), labels.flatten()
        count = torch.zeros((), dtype=torch.long, device=rows.device)
        step = max(1, CHUNK_BYTES // (4 * len(self.weight)))
        for first in range(0, len(rows), step):
            logits = torch.nn.functional.linear(rows[first : first + step], self.weight, self.bias)
            if self.finish is not None:
                logits = self.finish(logits[None])[0]
            wanted = targets[first : first + step]
            count += ((logits.argmax(-1) == wanted) & (wanted != ignored)).sum()
        return count

    def regularised(
        self, labels: torch.Tensor, ignored: int, z_loss: float, label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of what regularised cross entropies are, see `CrossEntropyRows`, and without gradients the plain sum.

        As `cross_entropy` in memory and precision, with z_loss and label_smoothing 0 in every bit.
        """
        sums = self._sums(CrossEntropyRows(labels.flatten(), ignored, z_loss, label_smoothing))
        return sums[0], sums[-1].detach()

    def distilled(
        self,
        teacher: torch.Tensor | Hidden,
        labels: torch.Tensor,
        ignored: int,
        temperature: float,
        share: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of what distillation costs, see `DistilledRows`, and the sums of its two parts, without gradients.

        As `cross_entropy` in memory; of the teacher, too, there are some rows of logits at a time.

        Args:
            teacher: logits (B, S, vocabulary), or what they are made of; columns beyond those of both are left out.
            labels, ignored: as for `cross_entropy`.
            temperature, share: see `DistilledRows`.
        """
        logits = teacher.rows if isinstance(teacher, Hidden) else teacher.flatten(0, -2).__getitem__
        total, nll, divergence = self._sums(DistilledRows(labels.flatten(), ignored, logits, temperature, share))
        return total, nll.detach(), divergence.detach()

    def log_probs(self, labels: torch.Tensor, ignored: int = -100) -> torch.Tensor:
        """The log-probability of each label, (B, S) in float32, 0 where nothing is predicted.

        Memory as for `cross_entropy`. What becomes of them is not known yet, so the backward pass computes the logits
        again: one matrix product of rows times width times vocabulary more than with all logits at once.

        Args:
            labels: (B, S), `ignored` where nothing is predicted.
            ignored: that label.
        """
        found: torch.Tensor = ChunkedLogProbs.apply(
            self.states.flatten(0, -2), self.weight, self.bias, self.finish, labels.flatten(), ignored, self._chunk
        )
        return found.view_as(labels)

    @torch.no_grad()
    def rows(self, chosen: slice) -> torch.Tensor:
        """The logits of some of the B * S rows, (rows, vocabulary), without gradients."""
        logits = torch.nn.functional.linear(self.states.flatten(0, -2)[chosen], self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits[None])[0]

    @property
    def _chunk(self) -> int:
        """Rows of which there are logits at a time."""
        return max(1, CHUNK_BYTES // (4 * len(self.weight)))

    def _sums(self, row_loss: RowLoss) -> torch.Tensor:
        rows = self.states.flatten(0, -2)
        sums: torch.Tensor = ChunkedSums.apply(
            rows, self.weight, self.bias, self.finish, row_loss, self._chunk, torch.is_grad_enabled()
        )
        return sums

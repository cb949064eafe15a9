"""Losses of some rows of logits with their gradients, for a loss of which there are never all logits; see hidden.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Found(NamedTuple):
    """What a loss is of some rows.

    Args:
        sums: (sums,), over these rows.
        d_logits: (rows, vocabulary), the first sum's gradient by the logits, before it is multiplied with `factors`;
            None: it was not asked for.
        factors: (rows), what the gradient of each row is to be multiplied with. Not done here: it would be a pass over
            all of the logits, where one over the rows' products with the weight is enough.
    """

    sums: torch.Tensor
    d_logits: torch.Tensor | None
    factors: torch.Tensor


class RowLoss(Protocol):
    """A loss that is a sum over rows, each with logits of its own.

    Attributes:
        sums: how many sums there are; the first is the loss, of which alone there are gradients.
    """

    sums: int

    def __call__(self, logits: torch.Tensor, chosen: slice, spare: torch.Tensor | None) -> Found:
        """The sums over some rows, and the gradient.

        Args:
            logits: (rows, vocabulary) in float32; their memory may be used.
            chosen: which rows these are, of all.
            spare: memory of that shape, for the gradient; None: it is not asked for.
        """
        ...


def normalised(logits: torch.Tensor, into: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of rows of logits, in other memory, and the logarithm of the sum that it divides by.

    One exponential of each logit, where logsumexp and a softmax after it would take two and a third piece of memory.

    Args:
        logits: (rows, vocabulary).
        into: of that shape.

    Returns:
        `into`; and log sum exp, (rows, 1).
    """
    torch.softmax(logits, 1, out=into)
    # The largest probability is exp(its logit) / sum; it is never small, so that its logarithm has all its digits.
    return into, logits.amax(1, keepdim=True) - into.amax(1, keepdim=True).log_()


class CrossEntropyRows:
    """Cross entropy with labels, in nats, and what keeps it from being too sure. A RowLoss: the loss, the plain one.

    A row costs (1 - s) (L - x[label]) + s (L - mean of x) + z L^2, with logits x and L = log sum exp x: label smoothing
    as torch's cross_entropy has it, and the z-loss of PaLM (Chowdhery et al. 2022, section 5).

    Args:
        labels: of all rows, `ignored` where nothing is predicted.
        ignored: that label.
        z_loss, label_smoothing: z and s. With both 0 there is only one sum.
    """

    def __init__(self, labels: torch.Tensor, ignored: int, z_loss: float = 0.0, label_smoothing: float = 0.0) -> None:
        self._labels, self._ignored, self._z, self._smoothing = labels, ignored, z_loss, label_smoothing
        self.sums = 2 if z_loss or label_smoothing else 1

    def __call__(self, logits: torch.Tensor, chosen: slice, spare: torch.Tensor | None) -> Found:
        targets = self._labels[chosen]
        predicted = targets != self._ignored
        index = targets.masked_fill(~predicted, 0)[:, None]
        at = logits.gather(1, index)
        if spare is None:
            d_logits, norm = None, logits.logsumexp(1, keepdim=True)
        else:
            d_logits, norm = normalised(logits, spare)
        nll = ((norm - at)[:, 0] * predicted).sum()
        found = nll[None]
        if self.sums > 1:
            rows = (1 - self._smoothing) * (norm - at)[:, 0] + self._z * norm[:, 0].square()
            if self._smoothing:
                rows = rows + self._smoothing * (norm[:, 0] - logits.mean(1))
            found = torch.stack([(rows * predicted).sum(), nll])
        if d_logits is None:
            return Found(found, None, predicted)
        # softmax minus one at the target, without another tensor of that size; nothing where nothing is predicted.
        if self._z:
            d_logits.mul_(1 + 2 * self._z * norm)
        if self._smoothing:
            d_logits.sub_(self._smoothing / logits.shape[1])
        d_logits.scatter_add_(1, index, torch.full_like(at, -(1.0 - self._smoothing)))
        return Found(found, d_logits, predicted)


class DistilledRows:
    """What a teacher says beside the labels (Hinton et al. 2015). A RowLoss: the loss, cross entropy, divergence.

    A row costs (1 - a) (cross entropy with the label) + a T^2 KL(teacher || student), the divergence of the softmaxes
    of both logits divided by T; T^2 keeps its gradient's size whatever T is. It is 0 where nothing is predicted.

    Args:
        labels: of all rows, `ignored` where nothing is predicted.
        ignored: that label.
        teacher: logits of the teacher for some rows, (rows, its vocabulary). Columns that only one of the two has are
            left out of the divergence: paddings of the vocabulary differ between models of a family.
        temperature, share: T and a.
    """

    sums = 3

    def __init__(
        self,
        labels: torch.Tensor,
        ignored: int,
        teacher: Callable[[slice], torch.Tensor],
        temperature: float,
        share: float,
    ) -> None:
        self._labels, self._ignored, self._teacher = labels, ignored, teacher
        self._temperature, self._share = temperature, share

    def __call__(self, logits: torch.Tensor, chosen: slice, spare: torch.Tensor | None) -> Found:
        given = self._teacher(chosen)
        columns, heat = min(logits.shape[1], given.shape[1]), self._temperature
        targets = self._labels[chosen]
        predicted = targets != self._ignored
        index = targets.masked_fill(~predicted, 0)[:, None]
        norm = logits.logsumexp(1, keepdim=True)
        nll = ((norm - logits.gather(1, index))[:, 0] * predicted).sum()
        theirs = (given[:, :columns].float() / heat).log_softmax(1)
        into = None if spare is None else spare[:, :columns]
        mine = torch.div(logits[:, :columns], heat, out=into).log_softmax(1)
        wanted = theirs.exp()
        divergence = heat**2 * ((wanted * (theirs - mine)).sum(1) * predicted).sum()
        found = torch.stack([(1 - self._share) * nll + self._share * divergence, nll, divergence])
        if spare is None:
            return Found(found, None, predicted)
        d_logits = logits.sub_(norm).exp_().mul_(1 - self._share)
        d_logits.scatter_add_(1, index, torch.full_like(norm, self._share - 1))
        d_logits[:, :columns] += self._share * heat * (mine.exp_() - wanted)
        return Found(found, d_logits, predicted)

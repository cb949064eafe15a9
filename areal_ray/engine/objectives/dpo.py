"""Direct preference optimization: answers that were preferred become likelier than those that were not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from areal_ray.config import ConfigError
from areal_ray.engine.objectives.base import Batch, FrozenModel, Objective
from areal_ray.engine.objectives.language_modeling import number
from areal_ray.engine.objectives.text import IGNORED, text_inputs, token_log_probs

REJECTED = "rejected_"  # before the names of the second answer's arrays, as data.format: preference has them
REFERENCE = "reference"  # name of the frozen model
# In a batch: what the reference says of the chosen and of the rejected answer, (B, 2) float32, sums over the tokens.
REFERENCE_LOG_PROBS = "reference_log_probs"
LOSSES = ("sigmoid", "ipo", "hinge")


class DirectPreference(Objective):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290) on rows of a chosen and a rejected answer to one prompt.

    With d = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)) a pair costs

        sigmoid  -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d); s > 0 is cDPO (Mitchell 2023)
        hinge    max(0, 1 - beta d) (SLiC, Zhao et al. 2023, arXiv:2305.10425)
        ipo      (d - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036)

    and the loss is the mean over all pairs of the global batch. Both answers go through the model in one pass, so a row
    of the batch takes the memory of two; with model.loss=chunked there are never all logits of either model. The
    reference is the run's model with its first weights: sharded like it, without an optimizer, in no checkpoint.

    Args:
        beta: how much it costs to depart from the reference.
        loss_type: sigmoid, ipo or hinge.
        label_smoothing: s, the share of pairs that are taken to be the wrong way round; below 0.5, for sigmoid only.
        average_log_prob: whether log-probabilities are means over an answer's tokens instead of sums; None: for ipo,
            as its authors mean it (and TRL does), and not for the others.
        precompute: whether the reference is asked once about all pairs, before training, and then let go: a forward
            pass over the data at the beginning instead of one at every step, and no memory for it afterwards. Restarts,
            and other runs on the same data from the same model, find what it said (8 bytes a pair).

    Raises:
        ConfigError: for anything else.
    """

    references = (REFERENCE,)
    metrics = (
        "reward_chosen",
        "reward_rejected",
        "reward_accuracy",
        "reward_margin",
        "log_prob_chosen",
        "log_prob_rejected",
    )
    takes_hidden = True

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        average_log_prob: bool | None = None,
        precompute: bool = False,
    ) -> None:
        self._beta = number("beta", beta, 0.0, math.inf)
        if not self._beta:
            raise ConfigError("objective.args.beta", "must be greater than 0")
        if loss_type not in LOSSES:
            raise ConfigError("objective.args.loss_type", f"knows {', '.join(LOSSES)}; not {loss_type!r}")
        self._smoothing = number("label_smoothing", label_smoothing, 0.0, 0.5)
        if self._smoothing and loss_type != "sigmoid":
            raise ConfigError("objective.args.label_smoothing", f"is for loss_type sigmoid, not {loss_type}")
        if average_log_prob not in (None, True, False):
            text = f"must be true or false, or null for what loss_type has, not {average_log_prob!r}"
            raise ConfigError("objective.args.average_log_prob", text)
        if not isinstance(precompute, bool):
            raise ConfigError("objective.args.precompute", f"must be true or false, not {precompute!r}")
        if precompute:
            self.once = (REFERENCE_LOG_PROBS,)
        self._loss_type = loss_type
        self._averages = loss_type == "ipo" if average_log_prob is None else bool(average_log_prob)

    def prepare(self, batch: Batch, models: Mapping[str, FrozenModel]) -> Batch:
        if REFERENCE_LOG_PROBS in batch:
            return batch
        both = in_one(batch)
        log_probs = models[REFERENCE].log_probs(text_inputs(both), both["labels"])
        return batch | {REFERENCE_LOG_PROBS: torch.stack(log_probs.sum(1).chunk(2), 1)}

    def model_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        return text_inputs(in_one(batch))

    def weight(self, batch: Batch) -> torch.Tensor:
        if f"{REJECTED}input_ids" not in batch or "labels" not in batch or f"{REJECTED}labels" not in batch:
            raise ValueError(
                "objective dpo: its rows have labels, rejected_input_ids and rejected_labels beside input_ids, as "
                f"data.format=preference makes them; these have {', '.join(sorted(batch))}"
            )
        return pairs(batch).sum()

    def loss(self, output: Any, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        labels = in_one(batch)["labels"]
        lengths = torch.stack((labels != IGNORED).sum(1).clamp(min=1).chunk(2), 1)  # (B, 2), as all that follows
        log_probs = torch.stack(token_log_probs(output, labels).sum(1).chunk(2), 1)
        gains = log_probs - batch[REFERENCE_LOG_PROBS]
        scores = gains / lengths if self._averages else gains
        losses = self._losses(scores[:, 0] - scores[:, 1])
        counts = pairs(batch)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return values.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)

        rewards, said = self._beta * gains.detach(), log_probs.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return mean(losses), {
            "reward_chosen": mean(rewards[:, 0]),
            "reward_rejected": mean(rewards[:, 1]),
            "reward_accuracy": mean((margins > 0).float()),
            "reward_margin": mean(margins),
            "log_prob_chosen": mean(said[:, 0]),
            "log_prob_rejected": mean(said[:, 1]),
        }

    def _losses(self, differences: torch.Tensor) -> torch.Tensor:
        """Of each pair, (B)."""
        if self._loss_type == "ipo":
            return (differences - 1 / (2 * self._beta)).square()
        scaled = self._beta * differences
        if self._loss_type == "hinge":
            return torch.relu(1 - scaled)
        if not self._smoothing:
            return -F.logsigmoid(scaled)
        return -(1 - self._smoothing) * F.logsigmoid(scaled) - self._smoothing * F.logsigmoid(-scaled)


def pairs(batch: Batch) -> torch.Tensor:
    """Which rows are pairs, (B): those in which nothing is predicted fill up a batch (`areal_ray.data.InOrder`)."""
    return (batch["labels"] != IGNORED).any(1) | (batch[f"{REJECTED}labels"] != IGNORED).any(1)


def in_one(batch: Batch) -> Batch:
    """The 2 B rows of both answers, the chosen ones first: what a model takes, and labels.

    Where rows of one kind have no padding, and so no mask, theirs is of ones.
    """
    sides = [batch, {name.removeprefix(REJECTED): v for name, v in batch.items() if name.startswith(REJECTED)}]
    width = max(side["input_ids"].shape[1] for side in sides)
    both: Batch = {}
    for name, fill in (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0), ("position_ids", 0)):
        if all(name not in side for side in sides):
            continue
        parts = [side[name] if name in side else _usual(name, side["input_ids"]) for side in sides]
        both[name] = torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
    return both


def _usual(name: str, input_ids: torch.Tensor) -> torch.Tensor:
    """What rows mean that lack an array."""
    if name == "attention_mask":
        return torch.ones_like(input_ids)
    assert name == "position_ids", name
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

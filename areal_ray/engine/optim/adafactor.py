"""Adafactor on sharded parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from areal_ray.engine.optim.grid import RankGrid, local


class ShardedAdafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235), the steps of `torch.optim.Adafactor`.

    That one does not work on DTensors (torch 2.13), and waits for the device three times for each parameter. Here the
    ranks add up all sums of rows and columns at once, and then all norms; the host waits for nothing.

    The state of a matrix is a row and a column, whole on every rank: for 70B parameters some 40M numbers, or 160 MB,
    which the ranks also add up in each step. What is no matrix has a second moment for each value, sharded with it. Of
    tensors of more dimensions (experts) the last two are a matrix.

    Args:
        groups: of parameters, with lr and weight_decay.
        grid: all ranks.
        beta2_decay: exponent of the step in the second moment's decay.
        eps: the smallest second moment's root (None: that of the number format), and the smallest size of a parameter
            to which its step is relative.
        d: root mean square of an update above which it is clipped.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        grid: RankGrid,
        beta2_decay: float,
        eps: tuple[float | None, float],
        d: float,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._grid, self._beta2_decay, self._eps, self._d = grid, beta2_decay, eps, d

    def allocate(self) -> None:
        """Make the state that the first step would need."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
                if p.ndim < 2:
                    state["variance"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                else:
                    rows, columns = _factor_shapes(p)
                    state["row_var"] = torch.zeros(rows, dtype=p.dtype, device=p.device)
                    state["col_var"] = torch.zeros(columns, dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights. A collective, where there are several ranks."""
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            return
        squares = self._observe([p for p, _ in work])
        norms = torch.stack([self._counted(p, self._update(p).square().sum()) for p, _ in work])
        norms = self._grid.sum(norms).sqrt()
        for (p, group), square, norm in zip(work, squares, norms, strict=True):
            self._change(p, group, square, norm)

    def _observe(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Take the gradients into the second moments; the sum of squares of each parameter."""
        flat = self._grid.sum(torch.cat([each.flatten() for p in parameters for each in self._sums(p)]))
        sizes = [n for p in parameters for n in (1, *(math.prod(shape) for shape in _factor_shapes(p)))]
        sums, squares = iter(flat.split(sizes)), []
        for p in parameters:
            squares.append(next(sums)[0])
            state = self.state[p]
            state["step"] += 1
            weight = state["step"] ** self._beta2_decay
            if p.ndim < 2:
                assert p.grad is not None
                local(state["variance"]).lerp_(local(p.grad).square(), weight)
                continue
            for name, count in (("row_var", p.shape[-1]), ("col_var", p.shape[-2])):
                state[name].lerp_(next(sums).view(state[name].shape) / count, weight)
        return squares

    def _sums(self, p: nn.Parameter) -> list[torch.Tensor]:
        """This rank's share of sums over a whole parameter: of its squares; of its gradient's, by row and by column."""
        assert p.grad is not None
        box, first = self._grid.box(p, self._grid.rank)
        found = [self._counted(p, local(p).square().sum())]
        if p.ndim >= 2:
            rows, columns = (torch.zeros(shape, dtype=p.dtype, device=p.device) for shape in _factor_shapes(p))
            if first:
                squares = local(p.grad).square()
                rows[(*box[:-1], slice(None))] = squares.sum(-1, keepdim=True)
                columns[(*box[:-2], slice(None), box[-1])] = squares.sum(-2, keepdim=True)
            found += [rows, columns]
        return found

    def _update(self, p: nn.Parameter) -> torch.Tensor:
        """This rank's part of the gradient over the root of its second moment."""
        assert p.grad is not None
        state, smallest = self.state[p], self._smallest(p)
        if p.ndim < 2:
            moment = local(state["variance"]).clone()
        else:
            box, _ = self._grid.box(p, self._grid.rank)
            rows, columns = state["row_var"], state["col_var"]
            mean = rows.mean(dim=-2, keepdim=True).clamp(min=smallest)
            moment = rows[(*box[:-1], slice(None))] * columns[(*box[:-2], slice(None), box[-1])]
            moment = moment / mean[(*box[:-2], slice(None), slice(None))]
        return moment.clamp_(min=smallest * smallest).rsqrt_().mul_(local(p.grad))

    def _change(self, p: nn.Parameter, group: dict[str, Any], square: torch.Tensor, norm: torch.Tensor) -> None:
        weight, lr, root = local(p), group["lr"], math.sqrt(p.numel())
        size = (square.sqrt() / root).clamp(min=self._eps[1])
        alpha = size * self.state[p]["step"].rsqrt().clamp(max=lr) / (norm / (root * self._d)).clamp(min=1.0)
        weight.mul_(1 - lr * group["weight_decay"])
        weight.sub_(self._update(p).mul_(alpha))

    def _counted(self, p: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """The value if this rank's part of the parameter counts, else 0."""
        return value if self._grid.box(p, self._grid.rank)[1] else torch.zeros_like(value)

    def _smallest(self, p: nn.Parameter) -> float:
        return torch.finfo(p.dtype).eps if self._eps[0] is None else self._eps[0]


def _factor_shapes(p: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of the sums by row and by column; none of a vector."""
    shape = tuple(p.shape)
    return [(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])] if p.ndim >= 2 else []

"""Muon for the matrices of hidden layers, sharded, with AdamW for everything else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from areal_ray.config import ConfigError
from areal_ray.engine.optim.grid import RankGrid, elements, local

Groups = list[dict[str, Any]]


def outer_matrices(model: nn.Module) -> set[torch.Tensor]:
    """Tables of embeddings, and the output layer's matrix: no hidden layers, and not what Muon is for."""
    found: set[torch.Tensor] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        return found | {head.weight}
    # An adapter that trains the whole head keeps it inside (peft's modules_to_save), beside its own factors, if any.
    inside = head.named_modules() if isinstance(head, nn.Module) else ()
    return found | {each.weight for name, each in inside if isinstance(each, nn.Linear) and "modules_to_save" in name}


def split_groups(model: nn.Module, groups: Groups, adamw: Sequence[str]) -> tuple[Groups, Groups]:
    """Parameter groups for Muon and for AdamW, each with the rates and decays of those that they are made of.

    Args:
        model: whose parameters they are.
        groups: as `parameter_groups` gives them.
        adamw: patterns of names of matrices that AdamW takes as well.

    Raises:
        ConfigError: if nothing is left for Muon, or a pattern is found in no name.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for pattern in adamw:
        if not any(re.search(pattern, name) for name in names.values()):
            raise ConfigError("optim.args.adamw", f"{pattern!r} is found in no parameter's name")
    outer = outer_matrices(model)

    def is_hidden(p: nn.Parameter) -> bool:
        return p.ndim == 2 and p not in outer and not any(re.search(pattern, names[p]) for pattern in adamw)

    def chosen(hidden: bool) -> Groups:
        parts = [{**group, "params": [p for p in group["params"] if is_hidden(p) == hidden]} for group in groups]
        return [part for part in parts if part["params"]]

    if not chosen(True):
        raise ConfigError("optim.name", "muon finds no matrix of a hidden layer among what is trained")
    return chosen(True), chosen(False)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024; `torch.optim.Muon`) and AdamW as one optimizer, whose state is keyed by parameter.

    On one rank it takes the steps of `torch.optim.Muon`, bit for bit. Of a sharded matrix no rank can orthogonalise its
    part alone. So each matrix has an owner: the others send it their parts of the update, it orthogonalises the whole
    and sends back to each rank what changes there (as in https://arxiv.org/abs/2504.05295). The ranks do as many
    matrices at a time as there are ranks, one each.

    A rank holds its part of the momentum, and while it steps a few times the largest whole matrix, in `precision`. It
    sends and receives its part of all matrices twice, in `precision` (70B parameters on 1,024 ranks, bfloat16: 0.3 GB
    each way), and an owner two whole matrices. The products take up to 30 * min(rows, columns) operations a parameter,
    shared by the ranks; where there are more ranks than matrices some have nothing to do.

    Args:
        hidden: groups of matrices for Muon.
        others: groups for AdamW.
        grid: all ranks.
        betas, adamw_eps: AdamW's.
        momentum, nesterov, ns_coefficients, ns_steps, eps, adjust_lr_fn: of `torch.optim.Muon`.
        precision: of the orthogonalisation, as a name in torch.
    """

    def __init__(
        self,
        hidden: Groups,
        others: Groups,
        grid: RankGrid,
        betas: tuple[float, float],
        adamw_eps: float,
        *,
        momentum: float,
        nesterov: bool,
        ns_coefficients: tuple[float, float, float],
        ns_steps: int,
        eps: float,
        adjust_lr_fn: str,
        precision: str,
    ) -> None:
        super().__init__([*hidden, *others], {"lr": 0.0, "weight_decay": 0.0})
        self._grid, self._momentum, self._nesterov = grid, momentum, nesterov
        self._coefficients, self._steps, self._eps = ns_coefficients, ns_steps, eps
        self._adjust, self._dtype = adjust_lr_fn, getattr(torch, precision)
        self._hidden = self.param_groups[: len(hidden)]
        self._adamw = None
        if others:  # the same dicts, so that both see the same rates
            settings: Any = {"lr": 0.0, "betas": betas, "eps": adamw_eps}
            self._adamw = torch.optim.AdamW(self.param_groups[len(hidden) :], **settings, fused=True)
            self._adamw.state = self.state

    def about(self, model: nn.Module) -> str:
        """A line that says which parameters of a model are whose."""
        names = {p: name for name, p in model.named_parameters()}
        count = sum(len(group["params"]) for group in self._hidden)
        others = self._adamw.param_groups if self._adamw is not None else []
        left = [names[p] for group in others for p in group["params"] if p.ndim >= 2]
        rest = sum(p.ndim < 2 for group in others for p in group["params"])
        shown = f"{', '.join(left[:4])}{f' and {len(left) - 4} more' if len(left) > 4 else ''}"
        return f"muon: {count} matrices; AdamW takes {shown}{' and ' * bool(left)}{rest} vectors"

    def allocate(self) -> None:
        """Make the state that the first step would make."""
        for group in self._hidden:
            for p in group["params"]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}
        if self._adamw is not None:
            allocate_adamw(self._adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights. A collective, where there are several ranks."""
        if self._adamw is not None:
            self._adamw.step()
        work = [(p, group) for group in self._hidden for p in group["params"] if p.grad is not None]
        work.sort(key=lambda each: -each[0].numel())  # those of one round take about as long
        for together in _batched(work, self._grid.size):
            self._round(together)

    def _round(self, work: Sequence[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Change as many matrices as there are ranks, or fewer; the rank at the place of each in the list owns it."""
        grid, ranks = self._grid, range(self._grid.size)
        parts = []
        for p, _ in work:
            _, first = grid.box(p, grid.rank)
            update = self._update(p)
            parts.append(update.flatten() if first else update.new_empty(0))
        parts += [parts[0].new_empty(0)] * (grid.size - len(work))
        mine = work[grid.rank][0] if grid.rank < len(work) else None
        boxes = [grid.box(mine, rank) for rank in ranks] if mine is not None else []
        sizes = [elements(box) if first else 0 for box, first in boxes] or [0] * grid.size
        came = grid.exchange(parts, sizes)
        parts = [came[0].new_empty(0)] * grid.size
        if mine is not None:
            whole = torch.empty(mine.shape, dtype=self._dtype, device=came[0].device)
            for (box, first), part in zip(boxes, came, strict=True):
                if first:
                    whole[box] = part.view([each.stop - each.start for each in box])
            whole = orthogonalised(whole, self._coefficients, self._steps, self._eps)
            parts = [whole[box].flatten() for box, _ in boxes]
        sizes = [local(p).numel() for p, _ in work] + [0] * (grid.size - len(work))
        for (p, group), change in zip(work, grid.exchange(parts, sizes), strict=False):
            weight, lr = local(p), group["lr"]
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(change.view(weight.shape), alpha=-lr * _lr_factor(self._adjust, p.shape))

    def _update(self, p: nn.Parameter) -> torch.Tensor:
        """This rank's part of what is to be orthogonalised: the momentum, after this step's gradient is in it."""
        assert p.grad is not None
        grad, momentum = local(p.grad), local(self.state[p]["momentum_buffer"])
        momentum.lerp_(grad, 1 - self._momentum)
        return (grad.lerp(momentum, self._momentum) if self._nesterov else momentum).to(self._dtype)


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """A matrix (rows, columns) near U V^T, where U S V^T is its singular value decomposition.

    Newton and Schulz's iteration, quintic, as in `torch.optim.Muon`, which computes it in bfloat16; here it is in the
    matrix's own precision. Source: https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def allocate_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that it would make in its first step (torch/optim/adam.py, `_init_group`), without one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }


def _lr_factor(how: str, shape: torch.Size) -> float:
    rows, columns = shape
    return math.sqrt(max(1, rows / columns)) if how == "original" else 0.2 * math.sqrt(max(rows, columns))


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some

"""Sources of a model's first weights, and what of them a model takes: renamed, converted, none of it read yet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from areal_ray.config import NameConfig
from areal_ray.distributed import Ranks
from areal_ray.models.conversion import names_of_module, to_module
from areal_ray.models.hf_weights import resolve, weights_of
from areal_ray.models.lazy_tensor import part_of, whole_box, windows
from areal_ray.models.merged_adapter import MergedAdapter
from areal_ray.models.safetensors_files import opened

_WINDOW = 16 << 20  # bytes of two matrices that are compared at a time
_SHOWN = 8


@dataclass(frozen=True)
class WeightSource:
    """Where first weights are, and how they become a model's.

    Args:
        where: for messages.
        open: every tensor that is there, by name, none of it read; a collective.
        of_files: the names are those of files that transformers writes; else they are those of modules, and only what
            is none is taken for a name in a file.
        names: changes of these names.
        allow_missing, allow_unused: patterns of what the model may go without, and of what it may leave.
        adapter: whose changes are added.
        lock: keeps what is there from being deleted while it is read.
    """

    where: str
    open: Callable[[Ranks], Mapping[str, torch.Tensor]]
    of_files: bool
    names: Sequence[NameConfig] = ()
    allow_missing: Sequence[str] = ()
    allow_unused: Sequence[str] = ()
    adapter: MergedAdapter | None = None
    lock: Callable[[], AbstractContextManager[None]] = nullcontext

    def fit(self, blank: nn.Module, ranks: Ranks) -> Fitted:
        """What of it a model takes, see `fit`. A collective.

        Raises:
            RankError: on every rank, if one of them could not read what is there.
            ValueError: on every rank, if it is of another model.
        """
        return fit(self, blank, self.open(ranks))


def of_directory(path: str) -> WeightSource:
    """The weights of a Hugging Face directory or hub name, all of them and no others."""
    return WeightSource(path, partial(_open_directory, path), of_files=True)


def _open_directory(path: str, ranks: Ranks) -> Mapping[str, torch.Tensor]:
    others = int(os.environ.get("LOCAL_RANK", "0")) > 0
    # One download per machine; the others then find it.
    ranks.all_or_raise(lambda: others or resolve(path))
    return ranks.all_or_raise(lambda: opened(resolve(path)))


@dataclass(frozen=True)
class Fitted:
    """What of a source a model takes.

    Args:
        weights: by the names of the model's parameters and persistent buffers, each once; not read yet.
        missing: names of these that are not there, as is allowed.
        unused: names in the source that the model does not take, as is allowed.
        twice: tied weights of which the source has several: (name, tensor) of each.
    """

    weights: dict[str, torch.Tensor]
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    twice: list[list[tuple[str, torch.Tensor]]] = field(default_factory=list)

    def differing(self) -> list[str] | None:
        """Names of tied weights that have different values in the source; None if all are alike.

        Reads both to the first difference.
        """
        for group in self.twice:
            (_, first), *others = group
            if any(not _same(first, other) for _, other in others):
                return [name for name, _ in group]
        return None


def fit(source: WeightSource, blank: nn.Module, stored: Mapping[str, torch.Tensor]) -> Fitted:
    """What of a source a model takes; nothing is read.

    Args:
        source: what `stored` comes from.
        blank: the model on the meta device, unsharded. It must not be used for anything else afterwards.
        stored: what is there, by name.

    Raises:
        ValueError: if weights are missing, have other shapes, or are more than the model takes, and that is not
            allowed; or if a change of names changes none, or makes two alike.
    """
    wanted, aliases = weights_of(blank), _aliases(blank)
    renamed = _renamed(source, stored)
    direct, rest = dict[str, torch.Tensor](), renamed
    if not source.of_files:
        own = names_of_module(blank)
        direct = {name: tensor for name, tensor in renamed.items() if name in own}
        rest = {name: tensor for name, tensor in renamed.items() if name not in own}
    unused = [name for name in rest if _matches(name, source.allow_unused)]
    complete = all(any(each in direct for each in aliases.get(name, [name])) for name in wanted)
    if complete:  # nothing is left that a file could have under another name
        unknown, problems, converted = [name for name in rest if name not in unused], list[str](), direct
    else:
        found = to_module(blank, {name: tensor for name, tensor in rest.items() if name not in unused})
        converted = {name: each for name, each in found.weights.items() if name not in direct} | direct
        unknown, problems = found.unknown, found.problems
    weights, missing, twice = dict[str, torch.Tensor](), list[str](), list[list[tuple[str, torch.Tensor]]]()
    for name, tensor in wanted.items():
        there = [(each, converted[each]) for each in aliases.get(name, [name]) if each in converted]
        if not there:
            if not any(problem.startswith(f"{name} ") for problem in problems):
                missing.append(name)
        elif there[0][1].shape != tensor.shape:
            problems.append(f"{name} is {tuple(there[0][1].shape)} in it and {tuple(tensor.shape)} here")
        else:
            weights[name] = there[0][1]
            if len(there) > 1:
                twice.append(there)
    problems += [f"{name} is missing" for name in missing if not _matches(name, source.allow_missing)]
    problems += [f"{name} is unknown here" for name in sorted(unknown) if not _matches(name, source.allow_unused)]
    if source.adapter is not None:
        tied = {name for group in aliases.values() if len(group) > 1 for name in group}
        weights, more = source.adapter.added_to(weights, tied)
        problems += more
    if problems:
        raise ValueError(f"the weights in {source.where} do not fit this model: {shortened(problems, '; ')}")
    unused += [name for name in sorted(unknown) if name not in unused]
    return Fitted(weights, missing, unused, twice)


def shortened(items: Sequence[str], separator: str = ", ") -> str:
    """The first of them in one line, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def _renamed(source: WeightSource, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = {name: name for name in stored}
    for i, each in enumerate(source.names):
        pattern = re.compile(each.pattern)
        found = {old: pattern.sub(each.replace, name) for old, name in changed.items() if pattern.search(name)}
        if not found:
            some = shortened([repr(name) for name in changed.values()][:3])
            raise ValueError(f"names[{i}]: {each.pattern!r} is found in no name of {source.where}: it has {some}, ...")
        changed |= found
    origin: dict[str, str] = {}
    for old, name in changed.items():
        if other := origin.get(name):
            raise ValueError(f"names: {other!r} and {old!r} of {source.where} would both be {name!r}")
        origin[name] = old
    return {name: stored[old] for name, old in origin.items()}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first one; a tied one has several, and is stored under any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in names.values()}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    boxes = windows(whole_box(one.shape), one.dtype.itemsize, _WINDOW)
    return all(torch.equal(part_of(one, box), part_of(other, box)) for box in boxes)

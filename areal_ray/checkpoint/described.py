"""What describes a checkpoint beside its shards: layout.json, and DCP's `.metadata` for torch's own tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.format.layout import Layout
from areal_ray.checkpoint.format.sums import shard_name
from areal_ray.checkpoint.plan import Places
from areal_ray.checkpoint.tree import paths
from areal_ray.processes.dcp_pickle import MetadataParts


@dataclass(frozen=True)
class Names:
    """Names of the tensors of a state, beyond those under which they are stored.

    Args:
        paths: the keys on the way to each tensor, by its dotted path.
        aliases: other dotted paths of tensors that have several (tied parameters): to the one that is stored.
    """

    paths: dict[str, tuple[str, ...]]
    aliases: dict[str, str]

    @classmethod
    def of(cls, state: Mapping[str, Stateful], trees: Mapping[str, Any]) -> Names:
        """Those of objects, each of which may have a method `aliases`: from the other paths to the stored ones."""
        found, others = paths(trees), dict[str, str]()
        for name, each in state.items():
            if aliases := getattr(each, "aliases", None):
                for alias, stored in aliases().items():
                    found[".".join((name, *alias))] = (name, *alias)
                    others[".".join((name, *alias))] = ".".join((name, *stored))
        return cls(found, others)


class LayoutFiles:
    """Contents of the files that describe a layout: made once, when they are first asked for, in the background."""

    def __init__(self, layout: Layout, places: Places, names: Names) -> None:
        self._layout, self._places, self._names = layout, places, names

    @cached_property
    def layout(self) -> bytes:
        """layout.json."""
        return self._layout.encode()

    @cached_property
    def parts(self) -> MetadataParts:
        """For DCP's `.metadata`, where a tensor with several names has an entry under each of them."""
        stored, places = self._layout.tensors, self._places
        cuts = {id(tensor.cut): tensor.cut for tensor in stored.values()}
        numbers = {key: number for number, key in enumerate(cuts)}
        ends = dict(zip(stored, accumulate(len(tensor.cut.shards) for tensor in stored.values()), strict=True))
        others = {alias: name for alias, name in self._names.aliases.items() if name in stored and alias not in stored}
        spans = [slice(ends[name] - len(stored[name].cut.shards), ends[name]) for name in others.values()]
        offsets, sizes = (
            np.concatenate([each, *(each[span] for span in spans)]) for each in (places.offsets, places.sizes)
        )
        named = [*stored.items(), *((alias, stored[name]) for alias, name in others.items())]
        tensors = [(name, t.dtype, t.shape, numbers[id(t.cut)]) for name, t in named]
        files = [shard_name(number) for number in range(self._layout.shards)]
        columns = [(cut.boxes, cut.shards) for cut in cuts.values()]
        paths = {name: self._names.paths.get(name, (name,)) for name, _ in named}
        return MetadataParts(tensors, columns, files, offsets, sizes, paths)

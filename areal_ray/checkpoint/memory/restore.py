"""Restoring from copies in memory: in place where each rank finds its own, else in boxes from wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint.memory.kept_images import ClaimedFiles
from areal_ray.checkpoint.memory.partners import Partners
from areal_ray.checkpoint.memory.parts import Part, digest, parts_of
from areal_ray.checkpoint.memory.reshard import Reshard
from areal_ray.checkpoint.memory.search import Copy, Given, Search, Version
from areal_ray.checkpoint.tree import flatten, local, merge
from areal_ray.distributed import Ranks
from areal_ray.distributed.device import Uploads


def restore(
    claimed: ClaimedFiles,
    state: Mapping[str, Stateful],
    info: Mapping[str, Any],
    attempt: int,
    newer_than: Version | None,
    ranks: Ranks,
    partners: Partners | None,
    complain: Callable[[str], None],
) -> Copy | None:
    """Bring objects to the newest state of which this attempt has claimed copies of all parts. A collective.

    Args:
        claimed: this rank's files of the attempt before.
        state, info, attempt, newer_than: as for `MemoryCopies.restore`.
        ranks: all ranks.
        partners: None: only copies count that the same rank of the same number of ranks has made.
        complain: prints a line for the user.
    """
    trees = {name: part.state_dict() for name, part in state.items()}
    tensors = flatten(trees)[0]
    parts, anywhere = parts_of(tensors), partners is not None
    search = Search(ranks, claimed.files, digest(info, parts), parts, attempt, anywhere, complain)
    given = search.newest(newer_than)
    if given is None:
        return None
    mine = {name: local(tensor).detach() for name, tensor in tensors.items()}
    if given.in_place:
        _fill(mine, given)
    else:
        assert partners is not None  # else only what is in its place counts
        _reshard(mine, given, partners, parts)
    for name, part in state.items():
        part.load_state_dict(merge(trees[name], given.copy.values.get(name, {})))
    return given.copy


def _fill(mine: Mapping[str, torch.Tensor], given: Given) -> None:
    uploads = Uploads()
    for tensor, kept in zip(mine.values(), given.images[0].tensors, strict=True):
        uploads.copy(tensor, kept)
    uploads.wait()


def _reshard(mine: Mapping[str, torch.Tensor], given: Given, partners: Partners, parts: list[Part]) -> None:
    pairs = zip(given.parts, given.images, strict=True)
    offers = [offer for has, image in pairs for offer in zip(has, image.tensors, strict=True)]
    Reshard(partners.link, parts).run(mine, offers)

"""Which rank has which part of a parameter: known to every rank without asking."""

from __future__ import annotations

from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Box = tuple[slice, ...]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, which changes with it; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class RankGrid:
    """All ranks at their places in the mesh.

    Args:
        mesh: of all ranks, in their order, with the names of its dimensions; None: there is one rank.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self._names = mesh.mesh_dim_names or () if mesh is not None else ()
        self._sizes = tuple(mesh.shape) if mesh is not None else ()
        self.size = prod(self._sizes)
        self.rank = dist.get_rank() if mesh is not None else 0

    def box(self, tensor: torch.Tensor, rank: int) -> tuple[Box, bool]:
        """The part of a tensor that lies on a rank, as slices of the whole.

        Dimensions of the mesh are gone through from the last to the first, as FSDP cuts what tensor parallelism has
        left; each cuts as torch.chunk does.

        Returns:
            The part; and whether this rank is the first of those that have it, the one that counts where each part is
            to be there once.
        """
        bounds, first = [(0, size) for size in tensor.shape], True
        if isinstance(tensor, DTensor):
            placements = dict(zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True))
            for name, size, at in reversed(list(zip(self._names, self._sizes, self._coordinates(rank), strict=True))):
                dim = getattr(placements.get(name), "dim", None)  # none of a Replicate, and of a dimension left out
                if dim is None:
                    first = first and at == 0
                else:
                    bounds[dim] = _chunk(bounds[dim], size, at)
        else:
            first = rank == 0
        return tuple(slice(*each) for each in bounds), first

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up over all ranks, in place; the same bits on each of them. A collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def exchange(self, parts: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """Send a part to each rank, and get one from each. A collective.

        Args:
            parts: flat, by the rank that gets them, of one type.
            sizes: elements that come from each rank.
        """
        if self.size == 1:
            return parts
        # As bytes: gloo does not know all types.
        sent = torch.cat(parts).view(torch.uint8)
        width = parts[0].element_size()
        came = torch.empty(sum(sizes) * width, dtype=torch.uint8, device=sent.device)
        dist.all_to_all_single(came, sent, [size * width for size in sizes], [part.numel() * width for part in parts])
        return list(came.view(parts[0].dtype).split(sizes))

    def _coordinates(self, rank: int) -> tuple[int, ...]:
        found = list[int]()
        for size in reversed(self._sizes):
            found.append(rank % size)
            rank //= size
        return tuple(reversed(found))


def elements(box: Box) -> int:
    """The number of values in a part."""
    return prod(each.stop - each.start for each in box)


def _chunk(bounds: tuple[int, int], count: int, number: int) -> tuple[int, int]:
    start, stop = bounds
    length = -(-(stop - start) // count)
    return min(stop, start + number * length), min(stop, start + (number + 1) * length)

"""Memory that outlives its process: claimed from the attempt before, filled anew, kept for the next one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence

import torch

from areal_ray.checkpoint.format.shard_file import ShardImage, populate
from areal_ray.checkpoint.memory.parts import Part, encode, parts_of
from areal_ray.checkpoint.tree import local
from areal_ray.processes.memory_keeper import MemoryKeeper, claim, find_record

_FREE = 0.1  # share of a machine's memory that must be left


class ClaimedFiles:
    """Files of copies that processes of the attempt before have left and this rank has taken over.

    Attributes:
        files: file descriptors, this object's.
    """

    def __init__(self) -> None:
        self.files: list[int] = []

    def claim(self, name: str) -> None:
        """Take over the files that are kept under this name, if any."""
        self.files += claim(name)

    def take(self, size: int) -> int | None:
        """Give away the smallest file that is large enough: new memory is filled several times slower than used one."""
        fitting = [file for file in self.files if os.fstat(file).st_size >= size]
        if not fitting:
            return None
        file = min(fitting, key=lambda file: os.fstat(file).st_size)
        self.files.remove(file)
        return file

    def missing(self, sizes: Sequence[int]) -> int:
        """Bytes of memory that files of these sizes take, if they are taken in this order, beyond what is here."""
        left, new = sorted(os.fstat(file).st_size for file in self.files), 0
        for size in sizes:
            fitting = next((have for have in left if have >= size), None)
            if fitting is None:
                new += size
            else:
                left.remove(fitting)
        return max(0, new - sum(left))  # what is left is let go

    def erase(self) -> None:
        """Cut off the records that make copies of the files; the memory stays."""
        for file in self.files:
            if (found := find_record(file)) is not None:
                os.ftruncate(file, found[0])

    def close(self) -> None:
        """Let the files go."""
        for file in self.files:
            os.close(file)
        self.files = []


def _check_room(new: int, neighbours: int, memory: tuple[int, int]) -> None:
    """Raise OSError if a machine has no room for so many bytes beside each of its ranks."""
    free, total = memory
    if new and free - neighbours * new < _FREE * total:
        needed = f"{new / 1e9:.1f} GB beside each of {neighbours} ranks"
        raise OSError(f"they need {needed}, and {free / 1e9:.1f} GB are free on this node")


class KeptImages:
    """Two images of this rank's own state, for the rank that takes its place; see MemoryKeeper.

    Args:
        name: under which the successor asks for them.
        owner: process id, with which the memory goes; None: it stays without one.
        claimed: memory to be used again.

    Attributes:
        images: none before `lay_out`.
        parts: of tensors, in each of them; also as text.
    """

    def __init__(self, name: str, owner: int | None, claimed: ClaimedFiles) -> None:
        self._name, self._owner, self._claimed = name, owner, claimed
        self._keeper: MemoryKeeper | None = None
        self.images: list[ShardImage] = []
        self.parts: list[Part] = []
        self.encoded = ""

    def plan(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Plan images of these tensors; their size in bytes."""
        self.parts = parts_of(tensors)
        self.encoded = encode(self.parts)
        self._items = [local(tensor).detach() for tensor in tensors.values()]
        self._size = ShardImage.size_of(self._items)
        return self._size

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the images are those of these tensors."""
        these = [(name, tuple(local(tensor).shape), tensor.dtype) for name, tensor in tensors.items()]
        return these == [(part.name, part.lengths, part.dtype) for part in self.parts]

    def lay_out(self, guests: Sequence[int], neighbours: int, memory: tuple[int, int]) -> None:
        """Make both as planned, in claimed memory where there is some, and have them kept.

        Args:
            guests: bytes of the files that this rank is to make for others, besides.
            neighbours: ranks that share this machine's memory.
            memory: bytes free and in all, before any of them took some.

        Raises:
            OSError: if there is no memory for them, or nobody to keep it; to be followed by `release`.
        """
        self._claimed.claim(self._name)  # its memory, if it is there still, is used again
        _check_room(self._claimed.missing([self._size, self._size, *guests]), neighbours, memory)
        for _ in range(2):
            self.images.append(ShardImage("", self._items, reused=self._claimed.take(self._size)))
        self._items = []  # which would hold on to tensors of the model
        self._keeper = MemoryKeeper(self._name, [image.fd for image in self.images], self._owner)

    def erase(self) -> None:
        """Cut off the records that make copies of the images."""
        for image in self.images:
            os.ftruncate(image.fd, image.size)

    def release(self) -> None:
        """Let the memory go."""
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        for image in self.images:
            image.close()
        self.images = []


class GuestFiles:
    """Two files for the copies of another rank, kept as one's own are.

    Args:
        name, owner, claimed: as for KeptImages.
        size: bytes of that rank's images.

    Attributes:
        files: file descriptors.
        memory: the bytes of each image.

    Raises:
        OSError: if there is no memory for them, or nobody to keep it. Nothing is kept then.
    """

    def __init__(self, name: str, owner: int | None, claimed: ClaimedFiles, size: int) -> None:
        self.size = size
        self.files: list[int] = []
        self.memory: list[torch.Tensor] = []
        self._keeper: MemoryKeeper | None = None
        try:
            for _ in range(2):
                reused = claimed.take(size)
                file = os.memfd_create("areal_ray partner copy") if reused is None else reused
                self.files.append(file)
                os.ftruncate(file, size)
                memory = mmap.mmap(file, size)
                populate(memory)
                self.memory.append(torch.frombuffer(memory, dtype=torch.uint8))
            self._keeper = MemoryKeeper(name, self.files, owner)
        except BaseException:
            self.release()
            raise

    def erase(self) -> None:
        """Cut off the records that make copies of the files."""
        for file in self.files:
            os.ftruncate(file, self.size)

    def release(self) -> None:
        """Let the memory go."""
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        self.memory = []
        for file in self.files:
            os.close(file)
        self.files = []

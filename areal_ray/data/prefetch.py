"""Batches as tensors on their device; their rows are read ahead of need: no step waits for a disk or a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

Batch = dict[str, torch.Tensor]
Rows = dict[str, np.ndarray]


class BatchMaker(Protocol):
    """Makes the batch that begins at a cursor out of its rows."""

    def take(self, first: int) -> Batch:
        """The batch that begins at cursor `first`; raises what reading its rows raises."""
        ...

    def close(self) -> None:
        """Drop what was made ahead."""
        ...


class RowReader(Protocol):
    """Gives the rows of the batch that begins at a cursor."""

    def take(self, first: int) -> Rows:
        """The rows; raises what reading them raises."""
        ...

    def close(self) -> None:
        """Drop what was read ahead."""
        ...


class Direct:
    """A RowReader that reads rows when they are asked for.

    Args:
        rows: reads the rows of the batch that begins at a cursor.
    """

    def __init__(self, rows: Callable[[int], Rows]) -> None:
        self.take = rows

    def close(self) -> None: ...


class ReadAhead:
    """A RowReader whose thread reads the rows of the next batches meanwhile.

    Rows that were read ahead are given out only for their own cursor: those of one that is gone past, or gone back
    from, are dropped, and with them an error in reading them. Memory: that of so many batches.

    Args:
        rows: as for Direct; called in the thread, one batch after the other.
        samples: from one batch's cursor to the next one's.
        ahead: batches, at least 1.
    """

    def __init__(self, rows: Callable[[int], Rows], samples: int, ahead: int) -> None:
        self._rows, self._samples, self._ahead = rows, samples, ahead
        self._thread = ThreadPoolExecutor(1, "rows")
        self._waiting: deque[tuple[int, Future[Rows]]] = deque()

    def take(self, first: int) -> Rows:
        while self._waiting and self._waiting[0][0] != first:
            self._waiting.popleft()[1].cancel()
        if not self._waiting:
            self._submit(first)
        wanted = self._waiting.popleft()[1]
        last = self._waiting[-1][0] if self._waiting else first
        while len(self._waiting) < self._ahead:
            last += self._samples
            self._submit(last)
        return wanted.result()

    def _submit(self, first: int) -> None:
        self._waiting.append((first, self._thread.submit(self._rows, first)))

    def close(self) -> None:
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)


class OnDemand:
    """A BatchMaker for the CPU: its memory is that which rows are read to.

    Args:
        rows: of the batches.
    """

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows

    def take(self, first: int) -> Batch:
        return {name: torch.from_numpy(array) for name, array in self._rows.take(first).items()}

    def close(self) -> None:
        self._rows.close()


class Prefetch:
    """A BatchMaker for a GPU: while a batch is computed on, the next one is read, pinned and copied.

    A thread does it, one batch ahead, with a stream of its own, so that neither the loop nor the main stream waits for
    the copy. A batch that was made ahead is given out only for its own cursor: one that is gone past, or gone back
    from, is dropped, and with it an error in making it. It takes the memory of one batch more, on both sides.

    Args:
        rows: of the batches; asked in the thread.
        samples: from one batch's cursor to the next one's.
        device: a CUDA device.
    """

    def __init__(self, rows: RowReader, samples: int, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._rows, self._samples, self._device = rows, samples, torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        # A thread begins on the first GPU, and would open a context there, whichever one its rank has.
        self._thread = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (self._device,))
        self._ahead: tuple[int, Future[tuple[Batch, torch.cuda.Event]]] | None = None

    def take(self, first: int) -> Batch:
        ahead, self._ahead = self._ahead, None
        made = ahead[1] if ahead is not None and ahead[0] == first else self._thread.submit(self._make, first)
        batch, copied = made.result()
        self._ahead = first + self._samples, self._thread.submit(self._make, first + self._samples)
        main = torch.cuda.current_stream(self._device)
        main.wait_event(copied)
        for tensor in batch.values():
            tensor.record_stream(main)  # its memory belongs to the other stream, which would reuse it at once
        return batch

    def _make(self, first: int) -> tuple[Batch, torch.cuda.Event]:
        pinned = {name: torch.from_numpy(array).pin_memory() for name, array in self._rows.take(first).items()}
        with torch.cuda.stream(self._stream):
            batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied

    def close(self) -> None:
        self._ahead = None
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._rows.close()


def batch_maker(rows: Callable[[int], Rows], samples: int, device: torch.device, ahead: int) -> BatchMaker:
    """The BatchMaker for a device.

    Args:
        rows: reads the rows of the batch that begins at a cursor.
        samples: from one batch's cursor to the next one's.
        device: where batches are put.
        ahead: batches whose rows are read before they are needed.
    """
    reader: RowReader = ReadAhead(rows, samples, ahead) if ahead else Direct(rows)
    return Prefetch(reader, samples, device) if device.type == "cuda" else OnDemand(reader)

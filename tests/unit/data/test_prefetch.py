"""Batches for a GPU, with the CUDA calls recorded: who makes what, where, and what waits for it."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from areal_ray.data import GlobalBatches, PackedTokens
from areal_ray.data.prefetch import OnDemand

pytestmark = pytest.mark.unit

BATCH = 4
DEVICE = torch.device("cuda", 3)


class Cuda:
    """Stands for the GPU: what it was asked for is in `calls`, as (thread is the main one, what)."""

    def __init__(self, patch):
        self.calls, self.stream = [], None
        patch.setattr(torch.cuda, "Stream", lambda device: f"side of {device}")
        patch.setattr(torch.cuda, "set_device", lambda device: self.note("set_device", device))
        patch.setattr(torch.cuda, "current_stream", lambda device: Main(self))
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "Event", lambda: Event(self))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.note("pin") or tensor)
        patch.setattr(torch.Tensor, "to", lambda *args, **how: self.to(*args, **how))
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.note("record_stream"))

    def note(self, *what):
        self.calls.append((threading.current_thread() is threading.main_thread(), *what))

    @contextmanager
    def on(self, stream):
        self.stream = stream
        yield
        self.stream = None

    def to(self, tensor, device, non_blocking=False):
        self.note("copy", device, non_blocking, self.stream)
        return tensor


class Main:
    def __init__(self, cuda):
        self.cuda = cuda

    def wait_event(self, event):
        self.cuda.note("wait", event)


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.cuda.note("event", stream)


class Rows(PackedTokens):
    """Sequence i is the token i; `read` has the first number of each reading, which fails for those in `bad`."""

    def __init__(self, count=40, bad=()):
        super().__init__(np.repeat(np.arange(count, dtype=np.uint16), 2), 2)
        self.read, self.bad, self.done = [], set(bad), threading.Condition()

    def __getitem__(self, indices):
        with self.done:
            self.read.append(int(indices[0]))
            self.done.notify_all()
        if int(indices[0]) in self.bad:
            raise OSError(f"cannot read {indices[0]}")
        return super().__getitem__(indices)

    def wait_for(self, count):
        with self.done:
            assert self.done.wait_for(lambda: len(self.read) >= count, timeout=10)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def batches(data, device=DEVICE, **kwargs):
    return GlobalBatches(data, 5, BATCH, 0, 1, device, **kwargs)


def plain(data, first):
    return GlobalBatches(data, 5, BATCH, 0, 1).ids(first)


def given(made):
    return next(made)["input_ids"][:, 0].tolist()


def test_a_batch_is_pinned_and_copied_by_a_thread_on_a_stream_of_its_own(cuda):
    data = Rows()
    made = batches(data)
    assert given(made) == plain(data, 0)
    data.wait_for(2)
    made.close()
    first = [call[1:] for call in cuda.calls if not call[0]][:6]
    copy = ("copy", DEVICE, True, f"side of {DEVICE}")
    assert first == [("set_device", DEVICE), ("pin",), ("pin",), copy, copy, ("event", f"side of {DEVICE}")]
    assert [call[1] for call in cuda.calls if call[0]] == ["wait", "record_stream", "record_stream"]


def test_the_next_batch_is_read_before_it_is_asked_for_and_no_further(cuda):
    data = Rows()
    made = batches(data)
    next(made)
    data.wait_for(2)
    assert made.next_sample == BATCH  # the cursor knows nothing of it
    assert made.state_dict()["next_sample"] == BATCH
    assert data.read == [plain(data, first)[0] for first in (0, BATCH)]
    assert [given(made) for _ in range(3)] == [plain(data, n * BATCH) for n in (1, 2, 3)]
    assert data.read[:4] == [plain(data, n * BATCH)[0] for n in range(4)]  # each once


def test_what_is_gone_past_or_gone_back_from_is_not_given_out(cuda):
    data = Rows()
    made = batches(data)
    start = made.state_dict()
    next(made)
    made.skip()
    assert given(made) == plain(data, 2 * BATCH)
    made.load_state_dict(start)
    assert given(made) == plain(data, 0)


def test_sequence_numbers_are_recorded_when_a_batch_is_taken(cuda):
    data, seen = Rows(), []
    made = batches(data, record=lambda first, ids: seen.append((first, ids)))
    next(made)
    data.wait_for(2)
    assert seen == [(0, plain(data, 0))]
    next(made)
    assert seen[1:] == [(BATCH, plain(data, BATCH))]


def test_an_error_is_raised_where_its_batch_is_taken_and_nowhere_else(cuda):
    data = Rows()
    data.bad = {plain(data, BATCH)[0]}
    made = batches(data)
    assert given(made) == plain(data, 0)
    data.wait_for(2)
    with pytest.raises(OSError, match="cannot read"):
        next(made)
    past = batches(data)
    next(past)
    past.skip()
    assert given(past) == plain(data, 2 * BATCH)


def test_on_a_cpu_there_is_no_thread_and_nothing_is_made_ahead():
    data = Rows()
    made = batches(data, "cpu")
    assert isinstance(made._maker, OnDemand)
    threads = set(threading.enumerate())  # of tests before this one some may be about to end
    next(made)
    assert set(threading.enumerate()) <= threads
    assert data.read == [plain(data, 0)[0]]


@pytest.mark.parametrize("device", ["cpu", DEVICE], ids=["cpu", "cuda"])
def test_rows_are_read_so_many_batches_ahead_and_no_further(cuda, device):
    data = Rows(80)
    made = batches(data, device, ahead=3)
    wanted = [plain(data, n * BATCH) for n in range(9)]
    assert given(made) == wanted[0]
    on_device = device != "cpu"  # one batch more is on its way there
    data.wait_for(4 + on_device)
    assert data.read == [ids[0] for ids in wanted[: 4 + on_device]]
    assert [given(made) for _ in range(3)] == wanted[1:4]
    made.skip()
    assert given(made) == wanted[5]
    start = {**made.state_dict(), "next_sample": 2 * BATCH}
    data.bad = {wanted[4][0]}
    made.load_state_dict(start)
    assert [given(made) for _ in range(2)] == wanted[2:4]
    with pytest.raises(OSError, match="cannot read"):
        next(made)
    assert given(made) == wanted[5]
    made.close()


def test_after_its_end_nothing_is_made_any_more(cuda):
    data = Rows()
    made = batches(data)
    next(made)
    made.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(made)

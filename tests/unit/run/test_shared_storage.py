"""Storage that not every node sees is named before anything is trained."""

import errno
import threading

import pytest

from areal_ray.run.shared_storage import NotShared, SharedStorage, agree, leave_token
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

LIMIT_S = 30


class Nodes:
    """One rank on each of several nodes, in threads; a RankError is here the first failure itself."""

    def __init__(self, count):
        self.barrier, self.values, self.count = threading.Barrier(count, timeout=LIMIT_S), [None] * count, count

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def start(self, storages, token="t"):
        ends = [None] * self.count

        def all_or_raise(rank, work):
            error = None
            try:
                work()
            except Exception as caught:  # noqa: BLE001
                error = caught
            failed = [each for each in self.exchange(rank, error) if each is not None]
            if failed:
                raise failed[0]

        def rank(number):
            storage = SharedStorage(storages[number], token, f"node-{number}", patience_s=0.05)
            lowest = lambda value: min(self.exchange(number, value))  # noqa: E731
            try:
                agree(storage, number, True, lambda work: all_or_raise(number, work), lowest)
            except Exception as error:  # noqa: BLE001
                ends[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        return ends


@pytest.fixture
def shared(tmp_path):
    storage = LocalStorage(tmp_path / "shared")
    storage.ensure()
    leave_token(storage, "t")
    return storage


@pytest.mark.parametrize("count", [1, 2, 3])
def test_nodes_that_share_their_storage_leave_nothing_but_the_token(shared, count):
    assert Nodes(count).start([shared] * count) == [None] * count
    assert shared.names() == ["submission"]


@pytest.mark.parametrize("there", [False, True])
def test_a_node_without_the_directory_or_with_one_of_its_own_is_named(shared, tmp_path, there):
    own = LocalStorage(tmp_path / "own")
    if there:
        own.ensure()
        leave_token(own, "of an earlier run that was copied")
    ends = Nodes(2).start([shared, own])
    assert all(isinstance(end, NotShared) for end in ends)
    assert f"node-1 does not see what the driver wrote to {own.location}" in str(ends[0])


def test_a_node_whose_writes_stay_with_it_is_found_by_the_next(shared, tmp_path):
    """A layer over the shared directory: what is below it is seen, what is written is not."""
    layer = LocalStorage(tmp_path / "layer")
    layer.ensure()
    leave_token(layer, "t")
    ends = Nodes(2).start([shared, layer])
    assert "does not see what node" in str(ends[0])


def test_a_node_that_may_only_read_is_named(shared, monkeypatch):
    read_only = LocalStorage(shared.location)

    def replace(name, data):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(read_only, "replace", replace)
    ends = Nodes(2).start([shared, read_only])
    assert str(ends[0]) == f"node-1 cannot write to {shared.location}: Read-only file system"


def test_what_is_wrong_with_the_storage_itself_stays_what_it_is(shared, monkeypatch):
    broken = LocalStorage(shared.location)

    def read(name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(broken, "read", read)
    (end,) = Nodes(1).start([broken])
    assert isinstance(end, OSError)
    assert end.errno == errno.EIO

"""What somebody reads is not deleted under them, and what is deleted does not look like a checkpoint on the way."""

import json
import time
from pathlib import Path

import pytest

from areal_ray.checkpoint import Catalog, CheckpointDamaged, load, read_manifest
from areal_ray.checkpoint.read_lock import has_readers, read_lock
from areal_ray.checkpoint.retention import remove
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints

from .boxes import Box, save_box, weights

pytestmark = pytest.mark.unit

NAME = "step-00000001.a1"
FILES = [".metadata", "layout.json", "manifest.json", "shard-00000.distcp", "shard-00000.sums", "state.json"]


@pytest.fixture
def checkpoint(tmp_path):
    return save_box(tmp_path)


@pytest.fixture
def catalog(tmp_path, checkpoint):
    return Catalog(LocalStorage(tmp_path))


def lease(checkpoint, until):
    """What a reader leaves that was killed."""
    checkpoint.replace(".reading-0123abcd", json.dumps({"until": until}).encode())


def test_nobody_reads_what_nobody_opened(checkpoint):
    assert not has_readers(checkpoint)


def test_a_reader_is_seen_while_it_reads_and_leaves_nothing(checkpoint):
    with read_lock(checkpoint):
        assert has_readers(checkpoint)
        assert checkpoints.check(checkpoint) > 0
    assert not has_readers(checkpoint)
    assert checkpoint.names() == FILES


def test_a_reader_that_fails_leaves_nothing(checkpoint):
    with pytest.raises(ZeroDivisionError), read_lock(checkpoint):
        raise ZeroDivisionError
    assert checkpoint.names() == FILES


def test_it_is_read_until_the_last_of_several_readers_is_done(checkpoint):
    with read_lock(checkpoint):
        with read_lock(checkpoint):
            pass
        assert has_readers(checkpoint)
    assert not has_readers(checkpoint)


def test_what_nobody_reads_is_deleted(catalog):
    assert remove(catalog, NAME)
    assert catalog.names() == []


def test_what_is_being_read_stays_a_checkpoint(catalog, checkpoint):
    before = checkpoint.read("manifest.json")
    with read_lock(checkpoint):
        assert not remove(catalog, NAME)
        assert checkpoint.read("manifest.json") == before
        assert catalog.newest().name == NAME
        assert checkpoints.check(checkpoint) > 0


def test_it_is_deleted_once_its_reader_is_done(catalog, checkpoint):
    with read_lock(checkpoint):
        assert not remove(catalog, NAME)
    assert remove(catalog, NAME)
    assert catalog.names() == []


def test_a_reader_that_was_killed_does_not_keep_it_for_ever(catalog, checkpoint):
    lease(checkpoint, until=time.time() - 1)
    assert not has_readers(checkpoint)
    assert remove(catalog, NAME)


def test_a_reader_that_was_killed_keeps_it_for_a_while(catalog, checkpoint):
    lease(checkpoint, until=time.time() + 3600)
    assert has_readers(checkpoint)
    assert not remove(catalog, NAME)


def test_a_lease_that_is_over_does_not_hide_one_that_is_not(catalog, checkpoint):
    lease(checkpoint, until=time.time() - 1)
    with read_lock(checkpoint):
        assert not remove(catalog, NAME)
    assert remove(catalog, NAME)


def test_a_save_that_never_finished_is_not_deleted_while_somebody_looks_at_it(catalog, checkpoint):
    checkpoint.remove("manifest.json")
    with read_lock(checkpoint):
        assert not remove(catalog, NAME)
    assert remove(catalog, NAME)


class Tells(LocalStorage):
    """Calls `tell(operation, name)` before every removal, read of a lease and deletion in here and below."""

    tell = staticmethod(lambda operation, name: None)

    def sub(self, name):
        below = type(self)(super().sub(name).location)
        below.tell = self.tell
        return below

    def remove(self, name):
        self.tell("remove", name)
        super().remove(name)

    def read(self, name):
        self.tell("read", name)
        return super().read(name)

    def delete(self):
        self.tell("delete", "")
        super().delete()


@pytest.fixture
def telling(tmp_path, checkpoint):
    return Tells(tmp_path)


def test_a_reader_that_begins_before_the_manifest_goes_keeps_its_checkpoint(telling, checkpoint):
    before = checkpoint.read("manifest.json")
    reader = read_lock(checkpoint)

    def begin(operation, name):
        if (operation, name) == ("remove", "manifest.json"):
            reader.__enter__()  # after the first look, before the manifest is taken away
            read_manifest(checkpoint)

    telling.tell = begin
    assert not remove(Catalog(telling), NAME)
    assert checkpoint.read("manifest.json") == before
    assert checkpoints.check(checkpoint) > 0
    reader.__exit__(None, None, None)
    assert checkpoint.names() == FILES
    telling.tell = Tells.tell
    assert remove(Catalog(telling), NAME)


def test_a_reader_that_begins_after_the_manifest_went_finds_no_checkpoint(telling, checkpoint):
    found = []

    def look(operation, name):
        if operation == "delete":
            try:
                found.append(checkpoints.check(checkpoint))
            except CheckpointDamaged as error:
                found.append(str(error))

    telling.tell = look
    assert remove(Catalog(telling), NAME)
    assert found == ["manifest.json: missing, so the save was never finished"]


def test_the_manifest_goes_before_anything_else(telling, checkpoint):
    left = []
    telling.tell = lambda operation, name: left.append((operation, name, checkpoint.names()))
    remove(Catalog(telling), NAME)
    changes = [(operation, name, names) for operation, name, names in left if operation != "read"]
    without = [name for name in FILES if name != "manifest.json"]
    assert changes == [("remove", "manifest.json", FILES), ("delete", "", without)]


def test_a_lease_that_ends_while_it_is_looked_at_is_no_reader(telling, checkpoint):
    lease(checkpoint, until=time.time() + 3600)

    def end(operation, name):
        if name.startswith(".reading-") and checkpoint.size(name) is not None:
            checkpoint.remove(name)

    telling.tell = end
    assert not has_readers(telling.sub(NAME))
    assert remove(Catalog(telling), NAME)


class ReadOnly(LocalStorage):
    """A file system that takes nothing."""

    def sub(self, name):
        return ReadOnly(super().sub(name).location)

    def replace(self, name, data):
        raise OSError(30, "Read-only file system")

    def remove(self, name):
        raise OSError(30, "Read-only file system")


def test_reading_works_where_one_may_not_write(checkpoint):
    there = ReadOnly(checkpoint.location)
    with read_lock(there):
        assert not has_readers(there)
    assert checkpoints.check(there) > 0
    assert checkpoints.digest(there) == checkpoints.digest(checkpoint)
    box = Box(**weights(0.0))
    load(there, {"box": box}, Ranks())
    assert box.tree["weight"].tolist() == weights()["weight"].tolist()
    assert checkpoint.names() == FILES


def test_a_lease_that_cannot_be_taken_back_does_not_hide_what_the_reading_said(checkpoint):
    class Fixed(LocalStorage):
        def remove(self, name):
            raise OSError(30, "Read-only file system")

    with pytest.raises(ZeroDivisionError), read_lock(Fixed(checkpoint.location)):
        raise ZeroDivisionError


def test_what_is_gone_is_said_to_be_no_checkpoint(catalog, checkpoint):
    remove(catalog, NAME)
    with pytest.raises(CheckpointDamaged, match="never finished"):
        checkpoints.check(checkpoint)
    assert catalog.names() == []


@pytest.mark.parametrize(
    "read", [checkpoints.check, checkpoints.digest, lambda there: load(there, {"box": Box(**weights())}, Ranks())]
)
def test_everything_that_reads_says_so_before_it_reads_the_manifest(telling, checkpoint, read):
    seen = {}
    telling.tell = lambda operation, name: seen.setdefault(name, has_readers(checkpoint))
    read(telling.sub(NAME))
    assert seen["manifest.json"]
    assert not has_readers(checkpoint)


def test_what_a_reader_that_was_killed_while_it_signed_in_left_is_no_reader(catalog, checkpoint):
    (Path(checkpoint.location) / ".reading-0badcafe.4711.tmp").write_bytes(b"")
    assert not has_readers(checkpoint)
    assert remove(catalog, NAME)

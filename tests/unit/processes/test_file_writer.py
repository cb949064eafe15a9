"""The process that writes checkpoints: what a new one in its place does not know is asked for again, or an error."""

import pickle
from contextlib import closing

import numpy as np
import pytest

from areal_ray.processes.dcp_pickle import MetadataParts
from areal_ray.processes.file_writer import FileWriter
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

PARTS = MetadataParts([], [], [], np.zeros(0), np.zeros(0))


@pytest.fixture
def writer():
    with closing(FileWriter()) as writer:
        yield writer


def written(writer, folder, name):
    writer.write_metadata(LocalStorage(folder), name, PARTS)
    return pickle.loads((folder / name).read_bytes())  # noqa: S301  (of our own child)


def test_metadata_is_encoded_once_and_again_by_a_new_process(writer, tmp_path):
    first = written(writer, tmp_path, "one")
    assert written(writer, tmp_path, "two") == first
    writer._child.kill()
    writer._child.wait()
    assert written(writer, tmp_path, "three") == first


def test_a_process_that_was_replaced_between_two_looks_writes_no_empty_metadata(writer, tmp_path, monkeypatch):
    written(writer, tmp_path, "one")
    start = writer.start
    looks = []

    def killed_after_the_first_look():
        start()
        looks.append(1)
        if len(looks) == 1:
            writer._child.kill()
            writer._child.wait()

    monkeypatch.setattr(writer, "start", killed_after_the_first_look)
    with pytest.raises(OSError, match="does not have the metadata"):
        writer.write_metadata(LocalStorage(tmp_path), "two", PARTS)
    assert not (tmp_path / "two").exists()

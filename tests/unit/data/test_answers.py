"""Answers of frozen models, kept by row: in pieces until they are complete, and beside the rows then."""

import numpy as np
import pytest

from areal_ray.data import PackedTokens
from areal_ray.data.answers import AnsweredRows, AnswerFile
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit

ANSWERS = np.arange(20, dtype=np.float32).reshape(10, 2)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def file_of(storage):
    return AnswerFile(storage, "train.said", 10, 4)


def test_pieces_are_put_together_and_removed(storage, tmp_path):
    file = file_of(storage)
    assert file.read() is None
    assert file.missing() == [range(0, 4), range(4, 8), range(8, 10)]
    for piece in reversed(file.pieces):
        file.write(piece, ANSWERS[piece.start : piece.stop])
    assert file_of(storage).missing() == []
    file.finish()
    file.finish()  # as another job does
    assert np.array_equal(file_of(storage).read(), ANSWERS)
    assert file_of(storage).missing() == []
    assert [path.name for path in tmp_path.iterdir()] == ["train.said.bin"]


def test_two_jobs_that_finish_at_once_do_not_harm_each_other(storage):
    mine, theirs = file_of(storage), file_of(storage)
    for piece in mine.pieces:
        mine.write(piece, ANSWERS[piece.start : piece.stop])
    read = mine._read
    done = []

    def late(name, rows):  # the other one is done just after this one has seen that it is not
        found = read(name, rows)
        if not done:
            done.append(theirs.finish())
        return found

    mine._read = late
    mine.finish()
    assert np.array_equal(file_of(storage).read(), ANSWERS)


@pytest.mark.parametrize("name", ["train.said.bin", "train.said-000000000004.part"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:5] + b"x" + data[6:], lambda data: b""])
def test_what_is_torn_is_asked_for_again(storage, tmp_path, name, damage):
    file = file_of(storage)
    for piece in file.pieces:
        file.write(piece, ANSWERS[piece.start : piece.stop])
    if name.endswith(".bin"):
        file.finish()
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    assert file.read() is None
    assert file.missing() == (file.pieces if name.endswith(".bin") else [range(4, 8)])


def test_rows_have_their_answers_and_are_the_same_data():
    rows = PackedTokens(np.arange(30), 3)
    answered = AnsweredRows(rows, {"said": ANSWERS})
    chosen = answered[np.asarray([7, 2])]
    assert np.array_equal(chosen["said"], ANSWERS[[7, 2]])
    assert np.array_equal(chosen["input_ids"], rows[np.asarray([7, 2])]["input_ids"])
    assert (len(answered), answered.fingerprint) == (10, rows.fingerprint)
    assert getattr(answered, "order", None) is None  # as of the rows themselves

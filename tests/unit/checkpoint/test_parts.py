"""Reading of boxes of tensors that were saved in parts, in ranges of any size, and nothing but what is needed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_ray.checkpoint import CheckpointDamaged, parts
from areal_ray.checkpoint.format.contents import Contents
from areal_ray.checkpoint.format.layout import LAYOUT, Cut, Layout, StoredTensor
from areal_ray.checkpoint.format.manifest import MANIFEST, STATE, FileRecord, Manifest
from areal_ray.checkpoint.format.shard_file import ShardImage
from areal_ray.checkpoint.format.sums import shard_name
from areal_ray.processes import file_writer
from areal_ray.storage import LocalStorage

from .boxes import bits, flip

pytestmark = pytest.mark.unit


def save_cut(path, tensors):
    """A checkpoint of tensors by name: each with its boxes as (offset, length, number of the file)."""
    directory = LocalStorage(path)
    directory.make()
    files, shards = {}, 1 + max((number for _, boxes in tensors.values() for *_, number in boxes), default=0)
    content = [[] for _ in range(shards)]
    stored = {}
    for name, (tensor, boxes) in tensors.items():
        for offset, length, number in boxes:
            content[number].append(tensor[tuple(slice(o, o + n) for o, n in zip(offset, length, strict=True))])
        array = np.array([[offset, length] for offset, length, _ in boxes], np.int64).reshape(
            len(boxes), 2, tensor.ndim
        )
        cut = Cut(array, np.array([number for *_, number in boxes], np.int64))
        stored[name] = StoredTensor(tuple(tensor.shape), str(tensor.dtype)[6:], cut)
    for number, pieces in enumerate(content):
        if pieces:
            image = ShardImage(shard_name(number), pieces)
            image.fill(pieces, [True] * len(pieces))
            files |= file_writer.write_summed(directory, image.file_name, image.content, image.chunks)
    files[LAYOUT] = file_writer.write_small(directory, LAYOUT, Layout(stored, shards).encode())
    files[STATE] = file_writer.write_small(directory, STATE, b"{}")
    directory.publish(MANIFEST, Manifest({}, {name: FileRecord(**record) for name, record in files.items()}).encode())
    return directory


class Recorded(LocalStorage):
    """Writes down which bytes of shards are read."""

    def __init__(self, path):
        super().__init__(path)
        self.read_bytes = []

    def read_range(self, name, offset, length):
        if name.endswith(".distcp"):
            self.read_bytes.append((name, offset, length))
        return super().read_range(name, offset, length)


def split(draw, length):
    """A length in one or more pieces, as (offset, length)."""
    ends = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3)) | {length}) if length > 1 else [length]
    return [(start, end - start) for start, end in zip([0, *ends], ends, strict=False)]


@st.composite
def cut_tensors(draw):
    """A tensor, its boxes in some files, and a box of it to be read."""
    shape = tuple(draw(st.lists(st.integers(1, 12), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    boxes = [((), ())]
    for length in shape:
        boxes = [((*o, start), (*n, count)) for o, n in boxes for start, count in split(draw, length)]
    boxes = [(o, n, draw(st.integers(0, 2))) for o, n in boxes]
    offset = tuple(draw(st.integers(0, length - 1)) for length in shape)
    wanted = tuple(draw(st.integers(1, length - start)) for start, length in zip(offset, shape, strict=True))
    return tensor, boxes, (offset, wanted)


@settings(max_examples=60)
@given(st.lists(cut_tensors(), min_size=1, max_size=3), st.sampled_from([1, 7, 64, 1 << 20]), st.data())
def test_any_box_of_any_cut_is_read_bit_for_bit(tmp_path_factory, tensors, piece, data):
    named = {f"t{i}": (tensor, boxes) for i, (tensor, boxes, _) in enumerate(tensors)}
    wanted = {f"t{i}": box for i, (*_, box) in enumerate(tensors)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_writer, "PIECE", piece)
        for constant in ("_BLOCK", "_REQUEST", "_GAP"):
            patch.setattr(parts, constant, data.draw(st.sampled_from([1, 16, 1 << 20])))
        directory = save_cut(tmp_path_factory.mktemp("cut") / "c", named)
        targets = {name: torch.full(length, 1).to(named[name][0].dtype) for name, (_, length) in wanted.items()}
        by_target = {id(target): wanted[name] for name, target in targets.items()}
        patch.setattr(parts, "box_of", lambda tensor: by_target[id(tensor)])
        parts.read_tensors(directory, Contents.decode(Contents.read(directory)), targets)
    for name, (offset, length) in wanted.items():
        expected = named[name][0][tuple(slice(o, o + n) for o, n in zip(offset, length, strict=True))]
        assert bits(targets[name]) == bits(expected)


def halves(rows):
    """A tensor of 4 KB in each row, cut in two files by rows."""
    tensor = torch.arange(rows * 1024.0).reshape(rows, 1024)
    return tensor, [((0, 0), (rows // 2, 1024), 0), ((rows // 2, 0), (rows // 2, 1024), 1)]


def read_rows(directory, start, count, monkeypatch):
    target = torch.zeros(count, 1024)
    monkeypatch.setattr(parts, "box_of", lambda tensor: ((start, 0), (count, 1024)))
    parts.read_tensors(directory, Contents.decode(Contents.read(directory)), {"t": target})
    return target


def test_of_a_large_part_only_the_pieces_that_are_needed_are_read(tmp_path, monkeypatch):
    tensor, boxes = halves(4096)  # files of 8 MB
    save_cut(tmp_path / "c", {"t": (tensor, boxes)})
    directory = Recorded(tmp_path / "c")
    assert torch.equal(read_rows(directory, 100, 8, monkeypatch), tensor[100:108])  # 32 KB
    assert [name for name, *_ in directory.read_bytes] == ["shard-00000.distcp"]
    assert sum(length for *_, length in directory.read_bytes) <= 2 * file_writer.PIECE


def test_tables_of_files_that_are_not_needed_are_not_read(tmp_path, monkeypatch):
    save_cut(tmp_path / "c", {"t": halves(4)})
    (tmp_path / "c" / "shard-00001.sums").unlink()
    (tmp_path / "c" / "shard-00001.distcp").unlink()
    assert read_rows(LocalStorage(tmp_path / "c"), 1, 1, monkeypatch)[0, 0] == 1024
    with pytest.raises(CheckpointDamaged, match=r"shard-00001\.sums: missing"):
        read_rows(LocalStorage(tmp_path / "c"), 1, 2, monkeypatch)


@pytest.mark.parametrize(("row", "found"), [(0, False), (1000, True), (1500, False)])
def test_damage_is_found_where_it_is_read_and_nowhere_else(tmp_path, monkeypatch, row, found):
    tensor, boxes = halves(4096)
    directory = save_cut(tmp_path / "c", {"t": (tensor, boxes)})
    flip(tmp_path / "c" / "shard-00000.distcp", 4096 * 1000 + 3000)
    if found:
        with pytest.raises(CheckpointDamaged, match=r"shard-00000\.distcp: the checksum of the bytes at"):
            read_rows(directory, row, 1, monkeypatch)
    else:
        assert torch.equal(read_rows(directory, row, 1, monkeypatch), tensor[row : row + 1])


def test_neighbours_are_read_in_one_piece(tmp_path):
    tensors = {f"t{i:02}": (torch.full((10,), float(i)), [((0,), (10,), i % 2)]) for i in range(50)}
    save_cut(tmp_path / "c", tensors)
    directory = Recorded(tmp_path / "c")
    targets = {name: torch.zeros(10) for name in tensors}
    parts.read_tensors(directory, Contents.decode(Contents.read(directory)), targets)
    assert [target[0] for target in targets.values()] == list(range(50))
    assert len(directory.read_bytes) == 2


def test_ranges_are_bounded_whatever_the_size_of_a_part(tmp_path, monkeypatch):
    save_cut(tmp_path / "c", {"t": halves(4096)})
    monkeypatch.setattr(parts, "_BLOCK", 1 << 20)
    monkeypatch.setattr(parts, "_REQUEST", 2 << 20)
    directory = Recorded(tmp_path / "c")
    read_rows(directory, 0, 4096, monkeypatch)
    assert max(length for *_, length in directory.read_bytes) <= (2 << 20) + 2 * file_writer.PIECE
    assert len(directory.read_bytes) > 8

"""The plan of a save for many ranks at once, made from what they would send."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from areal_ray.checkpoint.format.layout import Layout
from areal_ray.checkpoint.format.shard_file import framed_size
from areal_ray.checkpoint.plan import SavePlan, _Held, plan_all
from areal_ray.distributed import RankError, Ranks

pytestmark = pytest.mark.unit


def held(*tensors):
    """What a rank holds: (name, shape, offset, length) of each tensor, all of them float32."""
    table = [(name, shape, "float32") for name, shape, _, _ in tensors]
    boxes = [number for _, _, offset, length in tensors for number in (*offset, *length)]
    sizes = [framed_size(length, torch.float32) for *_, length in tensors]
    return _Held(table, np.array(boxes, np.int64), np.array(sizes, np.int64))


def rows(name, shape, ranks, rank):
    """A rank's part of a tensor that is cut by rows as torch.chunk does it: the last ones may be smaller, or empty."""
    each = -(-shape[0] // ranks)
    start, end = min(rank * each, shape[0]), min((rank + 1) * each, shape[0])
    return name, shape, (start, *[0] * (len(shape) - 1)), (end - start, *shape[1:])


def whole(name, shape):
    return name, shape, (0,) * len(shape), shape


def shares(packed):
    return [np.frombuffer(zlib.decompress(each), np.int32).tolist() for each in packed]


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@given(SHAPES, st.integers(1, 6), st.integers(1, 3), st.data())
def test_every_part_is_written_once_and_in_its_place(shapes, shards, replicas, data):
    names = [f"t{number}" for number in range(len(shapes))]
    cut = [data.draw(st.booleans()) if shape else False for shape in shapes]
    all_held = [
        held(
            *[
                rows(name, shape, shards, rank % shards) if is_cut else whole(name, shape)
                for name, shape, is_cut in zip(names, shapes, cut, strict=True)
            ]
        )
        for rank in range(shards * replicas)
    ]
    packed, layout, places = plan_all(all_held)  # Layout itself sees to it that parts are exactly the tensors
    assert {name: tensor.shape for name, tensor in layout.tensors.items()} == dict(zip(names, shapes, strict=True))
    ends = [0] * len(all_held)
    start = 0
    for name, tensor in layout.tensors.items():
        for part, rank in enumerate(tensor.cut.shards.tolist()):
            box = tensor.cut.boxes[part].tolist()
            expected = all_held[rank]
            at = sum(2 * len(shape) for key, shape, _ in expected.table if key < name)
            assert expected.boxes[at : at + 2 * len(tensor.shape)].tolist() == [*box[0], *box[1]]
            assert layout.rows[name][part] == shares(packed)[rank].index(names.index(name))
            size = framed_size(tuple(box[1]), torch.float32)
            assert (places.offsets[start], places.sizes[start]) == (ends[rank], size)
            ends[rank] += size
            start += 1
    assert start == len(places.offsets) == sum(map(len, shares(packed))) == layout.counts.sum()


@given(SHAPES, st.integers(1, 5))
def test_a_layout_comes_back_from_its_file(shapes, ranks):
    tensors = [(f"t{i}", shape) for i, shape in enumerate(shapes)]
    _, layout, _ = plan_all(
        [
            held(*[rows(name, shape, ranks, rank) if shape else whole(name, shape) for name, shape in tensors])
            for rank in range(ranks)
        ]
    )
    again = Layout.decode(layout.encode())
    assert again.shards == layout.shards
    for (name, one), (name_again, other) in zip(layout.tensors.items(), again.tensors.items(), strict=True):
        assert (name, one.shape, one.dtype) == (name_again, other.shape, other.dtype)
        assert one.cut.boxes.tolist() == other.cut.boxes.tolist()
        assert one.cut.shards.tolist() == other.cut.shards.tolist()
        assert (layout.rows[name] == again.rows[name]).all()


def test_what_all_ranks_hold_is_spread_over_them():
    tensors = [whole(f"t{i:02}", (100_000 + i,)) for i in range(40)]
    _, layout, places = plan_all([held(*tensors)] * 4)
    written = np.zeros(4, np.int64)
    np.add.at(written, np.concatenate([t.cut.shards for t in layout.tensors.values()]), places.sizes)
    assert written.max() - written.min() <= places.sizes.max()


def test_tensors_that_are_cut_alike_share_their_cut_and_the_file_does_not_grow_with_parts():
    def size(tensors, ranks):
        table = [[rows(f"t{i:04}", (ranks * 8, 16), ranks, rank) for i in range(tensors)] for rank in range(ranks)]
        return len(plan_all([held(*each) for each in table])[1].encode())

    one, many = size(1, 64), size(101, 64)
    assert many - one < 100 * 50
    assert one > 64 * 10


def test_with_replicas_and_counts_of_steps_a_layout_grows_with_the_tensors_only():
    """HSDP, 2 x 16: counts that every rank has do not turn the cut of each tensor into one of its own."""

    def of(rank):
        large = [rows(f"w{i:03}", (16 * 8, 4096), 16, rank % 16) for i in range(200)]
        return held(*[each for part in large for each in (part, whole(f"{part[0]}.step", ()))])

    _, layout, places = plan_all([of(rank) for rank in range(32)])
    assert len({id(tensor.cut) for tensor in layout.tensors.values()}) <= 3
    assert len(layout.encode()) < 30_000
    written = np.zeros(32, np.int64)
    np.add.at(written, np.concatenate([t.cut.shards for t in layout.tensors.values()]), places.sizes)
    assert written.max() < 1.2 * written.min()


def test_replicas_write_tensors_and_not_parts_so_that_uneven_ones_are_cut_in_few_ways_too():
    shapes = {f"w{i:03}": (16 * 8 - i % 5, 4096) for i in range(100)}

    def of(rank):
        return held(*[rows(name, shape, 16, rank % 16) for name, shape in shapes.items()])

    _, layout, _ = plan_all([of(rank) for rank in range(32)])
    assert len({id(tensor.cut) for tensor in layout.tensors.values()}) <= 2 * 5


def test_what_every_rank_reads_lies_together_in_one_file():
    def of(rank):
        large = [rows(f"w{i:02}", (80, 4096), 8, rank) for i in range(50)]
        return held(*[each for part in large for each in (part, whole(f"{part[0]}.step", ()))])

    _, layout, _ = plan_all([of(rank) for rank in range(8)])
    steps = [name for name in layout.tensors if name.endswith("step")]
    assert list(layout.tensors)[:50] == steps
    assert {int(layout.tensors[name].cut.shards[0]) for name in steps} == {0}
    assert [int(layout.rows[name][0]) for name in steps] == list(range(50))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[rows("a", (4,), 2, 0)], [rows("a", (4,), 2, 0)]], "more or less than the whole"),
        ([[rows("a", (4,), 2, 0)], [whole("a", (4,))]], "more or less than the whole"),
        ([[("a", (4,), (0,), (2,))], [("a", (4,), (1,), (2,))]], "overlap"),
        ([[rows("a", (4,), 2, 0)], [rows("a", (4, 1), 2, 1)]], "on one rank"),
        ([[rows("a", (4,), 2, 0)], []], "more or less than the whole"),
        ([[("a", (4,), (2,), (4,))]], "not inside"),
    ],
)
def test_parts_that_are_not_exactly_the_tensor_are_not_saved(ranks, message):
    with pytest.raises(ValueError, match=message):
        plan_all([held(*each) for each in ranks])


def test_ranks_that_hold_different_tensors_are_planned_together():
    _, layout, _ = plan_all(
        [held(whole("a", (2,)), rows("b", (4,), 2, 0)), held(rows("b", (4,), 2, 1), whole("c", ()))]
    )
    assert {name: tensor.cut.shards.tolist() for name, tensor in layout.tensors.items()} == {
        "a": [0],
        "b": [0, 1],
        "c": [1],
    }


def test_what_a_rank_sends_is_small_and_comes_back():
    one = held(*[rows(f"layers.{i}.weight", (1024 * 8, 4096), 1024, 3) for i in range(2000)])
    assert len(one.pack(one.digest)) < 10_000
    for known in (one.digest, "of others"):
        again = _Held.unpack(one.pack(known), one.table)
        assert (again.table, again.boxes.tolist(), again.sizes.tolist()) == (
            one.table,
            one.boxes.tolist(),
            one.sizes.tolist(),
        )


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda t: None, True),
        (lambda t: t.update(a=torch.ones(3)), True),
        (lambda t: t.update(a=torch.zeros(4)), False),
        (lambda t: t.update(a=torch.zeros(3).double()), False),
        (lambda t: t.update(c=torch.zeros(1)), False),
        (lambda t: t.pop("b"), False),
        (lambda t: t.update(a=t.pop("a")), False),
    ],
)
def test_a_plan_holds_as_long_as_the_state_is_laid_out_alike(change, fits):
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    plan = SavePlan(tensors, Ranks())
    change(tensors)
    assert plan.fits(tensors) is fits


def test_a_plan_that_cannot_be_made_is_the_outcome_on_every_rank(monkeypatch):
    monkeypatch.setattr("areal_ray.checkpoint.plan.box_of", lambda tensor: ((1,), (2,)))
    with pytest.raises(RankError, match="'a': "):
        SavePlan({"a": torch.zeros(2)}, Ranks())

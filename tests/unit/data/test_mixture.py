"""Mixtures: exact proportions in every stretch, each source with epochs of its own, and everything once."""

from collections import Counter

import numpy as np
import pytest

from areal_ray.data import GlobalBatches, PackedTokens
from areal_ray.data.dataset import IGNORED
from areal_ray.data.mixture import MixedRows, round_of, spread

pytestmark = pytest.mark.unit

SIZES = {"a": 70, "b": 13, "c": 400}
WEIGHTS = {"a": 0.7, "b": 0.1, "c": 0.2}


def mixed(weights=WEIGHTS, seq_len=4):
    firsts = dict(zip(SIZES, (0, 10_000, 20_000), strict=True))
    parts = {n: PackedTokens(np.repeat(firsts[n] + np.arange(SIZES[n]), seq_len), seq_len) for n in weights}
    return MixedRows(parts, weights)


def taken(rows, count, seed=7):
    order = rows.order(seed)
    return [order[n] for n in range(count)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 0.7, "b": 0.1, "c": 0.2}, {"a": 7, "b": 1, "c": 2}),
        ({"a": 1.0}, {"a": 1}),
        ({"a": 3.0, "b": 3.0}, {"a": 1, "b": 1}),
        ({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 1, "b": 2, "c": 4}),
        ({"a": 1e-9, "b": 1.0}, {"a": 1, "b": 9999}),
        ({"a": 0.33333, "b": 0.66666}, {"a": 1, "b": 2}),
    ],
)
def test_a_round_has_the_proportions_of_the_weights(weights, counts):
    assert round_of(weights) == counts


@pytest.mark.parametrize("counts", [[7, 1, 2], [1], [1, 1], [1, 9999], [33, 33, 34, 900], [3, 3, 3, 1]])
def test_every_stretch_has_the_share_of_each_source(counts):
    places = np.tile(spread(counts), 2)
    for number, count in enumerate(counts):
        before = np.concatenate([[0], np.cumsum(places == number)])
        ahead = before - np.arange(len(before)) * count / sum(counts)
        assert np.abs(ahead).max() < 1  # so that of no stretch the count is off by two


def test_each_source_has_epochs_of_its_own_with_every_row_once():
    rows = mixed()
    found = taken(rows, 2000)
    assert len(rows) == 483
    of = {
        "a": [n for n in found if n < 70],
        "b": [n for n in found if 70 <= n < 83],
        "c": [n for n in found if n >= 83],
    }
    assert {name: len(ids) for name, ids in of.items()} == {"a": 1400, "b": 200, "c": 400}
    for name, ids in of.items():
        for first in range(0, len(ids) - SIZES[name] + 1, SIZES[name]):
            assert len(set(ids[first : first + SIZES[name]])) == SIZES[name]
    assert of["a"][:70] != of["a"][70:140]
    assert rows.metrics(2000) == {
        **{"data/a/epoch": 20.0, "data/a/samples": 1400, "data/b/epoch": 15.3846, "data/b/samples": 200},
        **{"data/c/epoch": 1.0, "data/c/samples": 400},
    }


def test_the_order_of_a_source_does_not_depend_on_the_others():
    alone = MixedRows({"b": mixed()._parts["b"]}, {"b": 1.0})
    assert [n - 70 for n in taken(mixed(), 500) if 70 <= n < 83] == taken(alone, 50)


def test_any_world_size_goes_on_with_the_same_samples():
    def batches(rank, world, cursor=0):
        made = GlobalBatches(mixed(), 7, 8, rank, world)
        made.next_sample = cursor
        return made

    def samples(world, cursor, steps):
        ranks = [batches(rank, world, cursor) for rank in range(world)]
        return [sorted(int(i) for r in ranks for i in next(r)["input_ids"][:, 0]) for _ in range(steps)]

    undisturbed = samples(2, 0, 30)
    assert samples(2, 0, 10) + samples(1, 80, 10) + samples(2, 160, 10) == undisturbed
    made = batches(0, 1)
    next(made)
    assert made.metrics()["data/a/samples"] == 6
    assert made.state_dict()["sources"] == made.metrics()
    order = mixed().order(7)
    ids = {70: 10_000, 83: 20_000}
    expected = [order[n] for n in range(240)]
    values = [n if n < 70 else n - 70 + ids[70] if n < 83 else n - 83 + ids[83] for n in expected]
    assert Counter(values) == Counter(i for step in undisturbed for i in step)


def test_rows_that_are_less_wide_are_padded():
    narrow = PackedTokens(np.arange(8), 2)
    rows = MixedRows({"wide": PackedTokens(np.arange(8), 4), "narrow": narrow}, {"wide": 1, "narrow": 1})
    found = rows[np.asarray([2, 0])]
    assert found["input_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert found["labels"].tolist() == [[1] + [IGNORED] * 3, [1, 2, 3, IGNORED]]


def test_another_proportion_or_source_is_another_fingerprint():
    weights = [WEIGHTS, {"a": 7.0, "b": 1.0, "c": 2.0}, {"a": 0.6, "b": 0.2, "c": 0.2}, {"a": 0.7, "b": 0.1}]
    prints = [mixed(each).fingerprint for each in weights]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3

"""Global batches: one integer addresses them, for any number of ranks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_ray.data import GlobalBatches, PackedTokens

pytestmark = pytest.mark.unit
few = settings(max_examples=20)  # grain's shuffle of small numbers takes its time

BATCH = 6
WORLD_SIZES = [1, 2, 3, 6]


def sequences(count, seq_len=2):
    """Sequence i consists of the token i."""
    return PackedTokens(np.repeat(np.arange(count, dtype=np.uint16), seq_len), seq_len)


def ranks(data, seed, world_size, state=None):
    batches = [GlobalBatches(data, seed, BATCH, rank, world_size) for rank in range(world_size)]
    for part in batches:
        if state is not None:
            part.load_state_dict(state)
    return batches


def next_global_batch(parts):
    """The sample numbers of the next batch, in global order, put together from all ranks."""
    rows = [next(part)["input_ids"][:, 0].tolist() for part in parts]
    assert {len(mine) for mine in rows} == {BATCH // len(parts)}
    return [sample for row in zip(*rows, strict=True) for sample in row]


@few
@given(st.integers(20, 100), st.integers(0, 2**32 - 1), st.sampled_from(WORLD_SIZES), st.integers(0, 20))
def test_the_rows_of_all_ranks_are_the_global_batch(count, seed, world_size, t):
    data = sequences(count)
    parts = ranks(data, seed, world_size, {"next_sample": t * BATCH, "seed": seed, "fingerprint": data.fingerprint})
    expected = GlobalBatches(data, seed, BATCH, 0, 1).ids(t * BATCH)
    assert next_global_batch(parts) == expected


@few
@given(
    st.integers(20, 100),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.sampled_from(WORLD_SIZES), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_no_sample_is_lost_or_repeated_when_the_world_size_changes(count, seed, parts):
    data, state, seen = sequences(count), None, []
    for world_size, batches in parts:
        resumed = ranks(data, seed, world_size, state)
        for _ in range(batches):
            seen += next_global_batch(resumed)
        states = [part.state_dict() for part in resumed]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
        assert state["next_sample"] == len(seen)
        assert resumed[0].epoch == len(seen) // count
    for start in range(0, len(seen), count):
        epoch = seen[start : start + count]
        assert len(set(epoch)) == len(epoch)  # nothing twice, also where a batch reaches over the end of an epoch
        if len(epoch) == count:
            assert sorted(epoch) == list(range(count))


@few
@given(st.integers(20, 100), st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_the_same_seed_and_step_give_the_same_batch(count, seed, t):
    data = sequences(count)
    walked = GlobalBatches(data, seed, BATCH, 0, 1)
    for _ in range(t):
        next(walked)
    jumped = GlobalBatches(sequences(count), seed, BATCH, 0, 1)
    jumped.load_state_dict({"next_sample": t * BATCH, "seed": seed, "fingerprint": data.fingerprint})
    assert torch.equal(next(walked)["input_ids"], next(jumped)["input_ids"])


def test_another_seed_and_another_epoch_give_another_order():
    data = sequences(48)
    first, other = GlobalBatches(data, 0, 48, 0, 1), GlobalBatches(data, 1, 48, 0, 1)
    epochs = [first.ids(0), first.ids(48), other.ids(0)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(48))] * 3
    assert epochs[0] != epochs[1]
    assert epochs[0] != epochs[2]
    assert epochs[0] != list(range(48))


def test_a_batch_is_int64_tokens_and_the_next_of_each():
    batch = next(GlobalBatches(sequences(20, seq_len=5), 0, BATCH, 1, 3))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 5)),
        "labels": (torch.int64, (2, 5)),
    }
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert bool((batch["labels"][:, -1] == -100).all())


def test_iterating_is_what_next_does():
    data = sequences(20)
    first = next(iter(GlobalBatches(data, 0, BATCH, 0, 1)))
    assert first["input_ids"][:, 0].tolist() == GlobalBatches(data, 0, BATCH, 0, 1).ids(0)


@pytest.mark.parametrize(
    "other",
    [PackedTokens(np.arange(1, 41, dtype=np.uint16), 2), PackedTokens(np.arange(40, dtype=np.uint16), 4),
     PackedTokens(np.arange(42, dtype=np.uint16), 2), PackedTokens(np.arange(40, dtype=np.uint32), 2)],
    ids=["other text", "other length", "more text", "other type"],
)  # fmt: skip
def test_a_cursor_into_other_data_is_refused(other):
    data = PackedTokens(np.arange(40, dtype=np.uint16), 2)
    state = GlobalBatches(data, 0, BATCH, 0, 1).state_dict()
    batches = GlobalBatches(other, 0, BATCH, 0, 1)
    with pytest.raises(ValueError, match="the data is not what the checkpoint was trained on"):
        batches.load_state_dict({**state, "next_sample": 12})
    assert batches.next_sample == 0


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="6 cannot be shared evenly by 5 ranks"):
        GlobalBatches(sequences(20), 0, BATCH, 0, 5)


def test_what_does_not_fill_a_sequence_is_left_out():
    packed = PackedTokens(np.arange(11, dtype=np.uint16), 4)
    assert len(packed) == 2
    assert packed[np.array([1, 0])]["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_a_cursor_into_another_order_is_refused():
    data = sequences(20)
    batches = GlobalBatches(data, 1, BATCH, 0, 1)
    with pytest.raises(ValueError, match="is 2, but the checkpoint's data are in the order of seed 1"):
        GlobalBatches(data, 2, BATCH, 0, 1).load_state_dict(batches.state_dict())


def test_a_batch_that_is_skipped_is_gone_past_and_written_down():
    data, seen = sequences(40), []
    skipping = GlobalBatches(data, 3, BATCH, 0, 1, record=lambda first, ids: seen.append((first, ids)))
    plain = GlobalBatches(data, 3, BATCH, 0, 1)
    next(plain)
    skipping.skip()
    assert skipping.next_sample == plain.next_sample
    assert next(skipping)["input_ids"].tolist() == next(plain)["input_ids"].tolist()
    assert seen == [(first, plain.ids(first)) for first in (0, BATCH)]


class Masked(PackedTokens):
    """Rows of which those of odd tokens have padding, if there is any."""

    def __init__(self, padded):
        super().__init__(np.repeat(np.arange(40, dtype=np.uint16), 2), 2)
        self.padded = padded

    def __getitem__(self, indices):
        rows = super().__getitem__(indices)
        mask = np.ones_like(rows["input_ids"])
        mask[:, 1] -= self.padded * (rows["input_ids"][:, 1] % 2)
        return rows | {"attention_mask": mask}


def test_a_mask_that_masks_nothing_is_left_out():
    assert set(next(GlobalBatches(Masked(0), 0, BATCH, 0, 1))) == {"input_ids", "labels"}
    batch = next(GlobalBatches(Masked(1), 0, BATCH, 0, 1))
    assert torch.equal(batch["attention_mask"][:, 1], 1 - batch["input_ids"][:, 1] % 2)


class Pairs(PackedTokens):
    """Half of the second answer is padding."""

    def __getitem__(self, indices):
        rows = super().__getitem__(indices)
        mask = np.ones_like(rows["input_ids"])
        mask[:, 1:] = 0
        return {**rows, "rejected_input_ids": rows["input_ids"], "rejected_attention_mask": mask}


@pytest.mark.parametrize("ahead", [0, 3])
def test_positions_and_tokens_are_counted_as_they_are_given_out(ahead):
    text, pairs = (kind(np.arange(40, dtype=np.uint16), 2) for kind in (PackedTokens, Pairs))
    batches = GlobalBatches(text, 0, 4, 0, 2, ahead=ahead)
    next(batches)
    batches.skip()
    next(batches)
    assert (batches.positions, batches.tokens) == (8, 8)
    assert len(batches._counted) <= ahead + 1  # those of batches that are gone past are dropped
    batches.close()
    batches = GlobalBatches(pairs, 0, 4, 1, 2, ahead=ahead)
    for _ in range(3):
        next(batches)
    batches.next_sample = 0  # gone back
    next(batches)
    assert (batches.positions, batches.tokens) == (4 * 8, 4 * 6)
    batches.close()

"""Whatever happens to a run, each of its steps is made of the samples that it would have been made of."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_ray.data import GlobalBatches, PackedTokens
from areal_ray.train.cadence import Cadence
from areal_ray.train.loop import Progress

pytestmark = pytest.mark.unit

BATCH, STEPS = 6, 30
WORLD_SIZES = [1, 2, 3, 6]


@dataclass(frozen=True)
class Attempt:
    """A start of the workers: how many, after how many steps it ends, and whether it was told to leave or killed."""

    workers: int
    steps: int
    leaves: bool


class Rank:
    """What one rank carries from step to step, and saves."""

    def __init__(self, data, seed, rank, workers, every, saved):
        self.state = {
            "data": GlobalBatches(data, seed, BATCH, rank, workers),
            "progress": Progress(),
            "save": Cadence(steps=every[0], epochs=every[1]),
        }
        if saved is not None:
            for name, values in json.loads(saved).items():
                self.state[name].load_state_dict(values)

    def step(self):
        """Its samples of the next global batch."""
        data, progress = self.state["data"], self.state["progress"]
        rows = next(data)["input_ids"][:, 0].tolist()
        progress.step += 1
        progress.samples = data.next_sample
        return rows

    def due(self):
        return self.state["save"].due(self.state["progress"].step, self.state["data"].epoch)

    def dump(self):
        self.state["save"].fired(self.state["progress"].step, self.state["data"].epoch)
        return json.dumps({name: part.state_dict() for name, part in self.state.items()}, sort_keys=True)


def live(data, seed, every, attempts):
    """The samples of every step of a run, in the order in which it was computed, the last state, and its saves."""
    computed, saved, saves = [], None, []
    for attempt in [*attempts, Attempt(2, STEPS, leaves=True)]:
        ranks = [Rank(data, seed, rank, attempt.workers, every, saved) for rank in range(attempt.workers)]
        begun = ranks[0].state["progress"].step
        for step in range(begun + 1, min(begun + attempt.steps, STEPS) + 1):
            rows = [rank.step() for rank in ranks]
            computed.append((step, [sample for row in zip(*rows, strict=True) for sample in row]))
            last = step == STEPS or (attempt.leaves and step == begun + attempt.steps)
            if ranks[0].due() or last:
                dumps = {rank.dump() for rank in ranks}
                assert len(dumps) == 1  # nothing in it is one rank's own
                saved = dumps.pop()
                saves.append(step)
    return computed, saved, saves


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(20, 90),
    seed=st.integers(0, 2**32 - 1),
    every=st.tuples(st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.none(), st.integers(1, 2))),
    attempts=st.lists(st.builds(Attempt, st.sampled_from(WORLD_SIZES), st.integers(0, 12), st.booleans()), max_size=6),
)
def test_no_sequence_of_kills_resizes_and_saves_changes_a_step(count, seed, every, attempts):
    data = PackedTokens(np.repeat(np.arange(count, dtype=np.uint16), 2), 2)
    straight, end, _ = live(data, seed, every, [])
    computed, state, saves = live(data, seed, every, attempts)
    expected = dict(straight)
    assert all(samples == expected[step] for step, samples in computed)
    assert sorted(dict(computed)) == list(range(1, STEPS + 1))
    assert json.loads(state) == json.loads(end)
    # What was saved is never computed again.
    last_saved = 0
    position = 0
    for step, _ in computed:
        assert step > last_saved
        assert step <= position + 1
        position = step
        if saves and saves[0] == step:
            last_saved = saves.pop(0)


def test_an_epoch_sees_every_sample_once_however_it_is_interrupted():
    data = PackedTokens(np.repeat(np.arange(BATCH * 10, dtype=np.uint16), 2), 2)
    computed, _, _ = live(data, 3, (4, None), [Attempt(3, 7, False), Attempt(1, 5, True), Attempt(6, 9, False)])
    by_step = dict(computed)
    for epoch in range(3):
        seen = [sample for step in range(epoch * 10 + 1, epoch * 10 + 11) for sample in by_step[step]]
        assert sorted(seen) == list(range(BATCH * 10))

"""When storage is in the way: saves that fail, saves that are not done when the next is due."""

import pytest

from areal_ray.checkpoint import Catalog, Manifest
from areal_ray.distributed import RankError, Ranks
from areal_ray.storage import LocalStorage
from areal_ray.train.recovery import RecoverHandler, SavePolicy

pytestmark = pytest.mark.unit

GOOD = None
FULL = RankError([(0, "OSError: No space left", ["OSError"])])
GONE = RankError([(0, "RuntimeError: a peer is gone", ["RuntimeError"])])


class Save:
    """A future of a manifest, whose end is known beforehand; `waited` once somebody has waited for it."""

    def __init__(self, error, busy):
        self.error, self.busy, self.waited = error, busy, False

    def done(self):
        return not self.busy

    def exception(self):
        self.waited = True
        return self.error

    def result(self):
        return Manifest({}, {})

    def add_done_callback(self, work): ...


class Writer:
    """A CheckpointWriter and the Journal; saves end as told."""

    def __init__(self, *ends, busy=False):
        self.saves, self.ends, self.closed, self.fell_out, self.infos = [], [*ends], False, [], []
        self.busy = busy

    def begins(self, checkpoint, step): ...

    def begin(self, directory, state, info):
        self.saves.append(Save(self.ends.pop(0), self.busy))
        self.infos.append(info)
        return self.saves[-1]

    def close(self):
        self.closed = True

    def skipped(self, step):
        self.fell_out.append(step)


@pytest.fixture
def handler(tmp_path):
    def make(writer, policy):
        return RecoverHandler(Catalog(LocalStorage(tmp_path)), {}, writer, writer, 3, {"mesh": {}}, Ranks(), policy)

    return make


def test_a_dump_says_what_it_is(handler):
    writer = Writer(GOOD)
    dump = handler(writer, SavePolicy()).save(20, {"loss": 0.5})
    assert (dump.name, dump.step) == ("step-00000020.a3", 20)
    (info,) = writer.infos
    assert info.pop("time") > 1.7e9
    assert info == {"mesh": {}, "step": 20, "attempt": 3, "metrics": {"loss": 0.5}}


def test_failed_saves_are_borne_until_there_are_too_many_in_a_row(handler):
    recover = handler(Writer(FULL, FULL, FULL), SavePolicy(max_failed_saves=3))
    for step in (1, 2, 3):
        assert recover.save(step, {}) is not None
    with pytest.raises(RankError, match="No space left"):
        recover.save(4, {})


def test_a_good_save_in_between_begins_the_count_anew(handler):
    recover = handler(Writer(FULL, GOOD, FULL, GOOD), SavePolicy(max_failed_saves=2))
    for step in (1, 2, 3, 4):
        recover.save(step, {})
    recover.finish()


def test_what_is_not_the_storage_s_fault_is_not_borne(handler):
    recover = handler(Writer(GONE), SavePolicy(max_failed_saves=3))
    recover.save(1, {})
    with pytest.raises(RankError, match="a peer is gone"):
        recover.save(2, {})


def test_a_run_does_not_end_well_if_its_last_save_failed(handler):
    recover = handler(Writer(FULL), SavePolicy(max_failed_saves=3))
    recover.save(1, {})
    with pytest.raises(RankError, match="No space left"):
        recover.finish()


def test_finishing_waits_for_the_last_save_and_closes_the_writer(handler):
    writer = Writer(GOOD, busy=True)
    recover = handler(writer, SavePolicy())
    recover.save(1, {})
    recover.finish()
    assert writer.saves[0].waited
    assert writer.closed


def test_the_save_before_is_waited_for(handler):
    writer = Writer(GOOD, GOOD, busy=True)
    recover = handler(writer, SavePolicy())
    recover.save(1, {})
    assert not writer.saves[0].waited
    recover.save(2, {})
    assert writer.saves[0].waited
    assert writer.fell_out == []


def test_a_save_falls_out_while_storage_is_busy_if_so_wished(handler):
    writer = Writer(GOOD, GOOD, busy=True)
    recover = handler(writer, SavePolicy(skip_when_busy=True))
    recover.save(1, {})
    assert recover.save(2, {}) is None
    assert writer.fell_out == [2]
    assert not writer.saves[0].waited
    writer.saves[0].busy = False
    assert recover.save(3, {}).step == 3


def test_a_save_that_must_be_never_falls_out(handler):
    writer = Writer(GOOD, GOOD, busy=True)
    recover = handler(writer, SavePolicy(skip_when_busy=True))
    recover.save(1, {})
    assert recover.save(2, {}, must=True).step == 2
    assert writer.fell_out == []

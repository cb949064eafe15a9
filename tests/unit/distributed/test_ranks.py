"""Ranks in a single process, and the error that says what happened where."""

import pickle

import pytest

from areal_ray.distributed import RankError, Ranks

pytestmark = pytest.mark.unit

FULL = (1, "OSError: No space left", ["OSError", "Exception", "BaseException", "object"])
TORN = (3, "ValueError: torn", ["ValueError", "Exception", "BaseException", "object"])


def test_a_single_process_is_rank_0_of_1_and_agrees_with_itself():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather("a") == ["a"]
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    assert ranks.all_reduce_min(3) == 3
    assert ranks.agree(True) is True
    assert ranks.agree(False) is False
    assert ranks.gather_to_rank_zero("a") == ["a"]
    assert ranks.scatter(["a"]) == "a"
    assert ranks.all_or_raise(lambda: 7) == 7
    assert ranks.on_rank_zero(lambda: 7) == 7


@pytest.mark.parametrize("method", ["all_or_raise", "on_rank_zero"])
def test_work_that_fails_is_a_rank_error_with_its_cause(method):
    def work():
        raise FileNotFoundError("no such thing")

    with pytest.raises(RankError, match="FileNotFoundError: no such thing") as caught:
        getattr(Ranks(), method)(work)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert caught.value.only(OSError)
    assert not caught.value.only(ValueError)


@pytest.mark.parametrize("failures", [[FULL], [FULL, TORN]])
def test_a_rank_error_names_the_ranks_that_failed(failures):
    for rank, text, _ in failures:
        assert f"rank {rank}: {text}" in str(RankError(failures))


def test_a_rank_error_knows_if_one_kind_was_all_that_happened():
    assert RankError([FULL]).only(OSError)
    assert not RankError([FULL, TORN]).only(OSError)
    assert RankError([FULL, TORN]).only(Exception)


def test_a_rank_error_survives_being_sent_to_the_driver():
    error = RankError([FULL, TORN])
    error.add_note("File ...")
    other = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(other), other.failures) == (str(error), error.failures)
    assert other.__notes__ == ["File ..."]

"""Exceptions on their way to the controller, which looks for modules elsewhere than a worker."""

import sys

import pytest

from areal_ray.cluster.failures import annotate, ensure_picklable
from areal_ray.distributed import RankError

pytestmark = pytest.mark.unit


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def annotated(error):
    try:
        raise error
    except type(error) as caught:
        annotate(caught, 7)
        return caught


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An exception class of a module beside an experiment."""
    (tmp_path / "own_errors_of_a_test.py").write_text("class Mine(ValueError):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_errors_of_a_test  # type: ignore[import-not-found]

    yield own_errors_of_a_test.Mine
    sys.modules.pop("own_errors_of_a_test")


def test_a_class_that_cannot_be_unpickled_is_a_runtime_error_with_its_traceback_and_step():
    with pytest.raises(RuntimeError, match=r"^Odd: 1 and 2") as caught:
        ensure_picklable(annotated(Odd(1, 2)))
    assert caught.value.areal_ray["step"] == 7
    assert "raise error" in caught.value.__notes__[0]


def test_so_is_a_class_that_only_the_worker_finds(own, tmp_path):
    with pytest.raises(RuntimeError, match=r"^Mine: no") as caught:
        ensure_picklable(annotated(own("no")), ["/elsewhere", str(tmp_path)])
    assert caught.value.areal_ray["step"] == 7


@pytest.mark.parametrize("error", [ValueError("no"), RankError([(1, "ValueError: no", ["ValueError"])])])
def test_others_go_as_they_are_wherever_the_code_lies(error, own):
    ensure_picklable(annotated(error), ["/", "."])
    ensure_picklable(annotated(own("no")), ["/elsewhere"])

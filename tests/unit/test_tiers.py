"""A test that has not the marker of its tier ends the collection."""

from types import SimpleNamespace

import pytest

from tests import conftest

pytestmark = pytest.mark.unit


class Item:
    def __init__(self, path, *markers):
        self.path, self._markers = conftest.HERE / path, markers

    def get_closest_marker(self, name):
        return name if name in self._markers else None


ALONE = SimpleNamespace()
BESIDE_OTHERS = SimpleNamespace(workerinput={})


def test_the_marker_of_the_folder_is_enough():
    items = [Item("unit/run/test_a.py", "unit"), Item("ray/test_b.py", "slow", "ray")]
    first, second = items
    conftest.pytest_collection_modifyitems(ALONE, items)
    assert items == [first, second]
    conftest.pytest_collection_modifyitems(BESIDE_OTHERS, items)
    assert items == [second, first]


@pytest.mark.parametrize("item", [Item("ray/test_b.py", "slow"), Item("ray/test_b.py", "unit"), Item("unit/test_c.py")])
def test_none_and_another_one_are_refused(item):
    with pytest.raises(pytest.UsageError, match=rf"{item.path.name}: (ray|unit)"):
        conftest.pytest_collection_modifyitems(ALONE, [Item("ray/test_a.py", "ray"), item])

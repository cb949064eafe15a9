"""Every part of the benchmark can be imported: the package's names that it uses are there."""

import importlib
import pkgutil

import pytest

import tests.bench

pytestmark = pytest.mark.unit
NAMES = [
    each.name for each in pkgutil.walk_packages(tests.bench.__path__, "tests.bench.") if "__main__" not in each.name
]


@pytest.mark.parametrize("name", NAMES)
def test_a_part_can_be_imported(name):
    if name.endswith(".pictures"):
        pytest.importorskip("matplotlib", reason="pictures need the extra areal_ray[bench]")
    importlib.import_module(name)

"""What all tests of this tier share."""

import pytest
from hypothesis import settings

from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage

# The same examples every time, and none of them failed for being slow on a busy machine.
settings.register_profile("unit", deadline=None, derandomize=True)
settings.load_profile("unit")


@pytest.fixture
def run(tmp_path):
    """An empty run directory, `mine`."""
    storage = LocalStorage(tmp_path / "mine")
    storage.make()
    return RunDir(storage)

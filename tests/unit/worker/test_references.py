"""Frozen models of an objective: the ones that a run began with."""

import pytest

from areal_ray.checkpoint import Catalog, save
from areal_ray.config import ConfigError, load
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.worker.frozen import check_references, recorded_references
from tests.unit.checkpoint.boxes import Box, weights

pytestmark = pytest.mark.unit

BEFORE = {"reference": "a" * 32}


def check(now, *overrides, before=BEFORE):
    check_references(before, now, load("conf/experiments/tiny.yaml", list(overrides)))


def test_they_are_those_of_the_newest_checkpoint(tmp_path):
    catalog = Catalog(LocalStorage(tmp_path))
    assert recorded_references(catalog) == {}
    for step, references in ((1, {"reference": "b"}), (2, BEFORE)):
        info = {"step": step, "attempt": 1, "references": references}
        save(catalog.directory(Catalog.name(step, 1)), {"box": Box(**weights())}, info, Ranks())
    assert recorded_references(catalog) == BEFORE


def test_another_one_ends_the_run_unless_it_may_change():
    changed = {"reference": "c" * 32}
    with pytest.raises(ConfigError, match=r"`reference` is not the one .* cccccccccccc, then aaaaaaaaaaaa"):
        check(changed)
    check(changed, "run.allow_changes=[objective]")
    check(BEFORE)
    check({"teacher": "d" * 32})  # of another name
    check(changed, before={})

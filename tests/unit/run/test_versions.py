"""Another Python, Ray, torch or areal_ray on a node is named."""

import pickle

import pytest

from areal_ray.run import versions as module
from areal_ray.run.versions import BINDING, OtherVersions, differences, mismatch, versions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", BINDING)
def test_what_differs_on_a_node_is_named_with_both_versions(name):
    mine = {**versions(), name: "0.0.1"}
    expected = f"node-b (10.0.0.2) has {name} 0.0.1 (the driver has {versions()[name]}): all nodes must have the same"
    assert mismatch(versions(), mine, "node-b (10.0.0.2)") == expected
    assert differences(mine, versions()) == [f"{name} 0.0.1 (here {versions()[name]})"]


def test_all_that_differs_is_named_at_once():
    told = mismatch({"torch": "2", "ray": "4"}, {"torch": "1", "ray": "3"}, "node")
    assert told == "node has torch 1 (the driver has 2), ray 3 (the driver has 4): all nodes must have the same"


def test_what_is_raised_reaches_the_controller_in_one_piece():
    error = OtherVersions({"b": "b has torch 1", "c": "c has torch 2"}, {"torch": "3"}, here=True)
    sent = pickle.loads(pickle.dumps(error))  # noqa: S301  (its own)
    assert str(sent) == "b has torch 1; c has torch 2"
    assert vars(sent) == vars(error)


def test_the_same_is_fine_and_so_is_what_does_not_change_a_run(monkeypatch):
    assert mismatch(versions(), versions(), "node") is None
    assert mismatch(versions(), {**versions(), "numpy": "0.0.1"}, "node") is None
    assert mismatch({"python": "3.11.7"}, {"python": "3.11.15"}, "node") is None
    assert mismatch({}, versions(), "node") is None  # a driver that does not say
    monkeypatch.setattr(module, "version", lambda package: "2.13.0+cu130")
    gpu = versions()
    monkeypatch.setattr(module, "version", lambda package: "2.13.0+cpu")
    assert mismatch(gpu, versions(), "node") is None


def test_a_package_that_is_not_there_is_missing(monkeypatch):
    def version(package):
        raise module.PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", version)
    assert versions()["torch"] == "missing"

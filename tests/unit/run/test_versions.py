"""Another Python, Ray, torch or areal_ray on a node is named."""

import pytest

from areal_ray.run import versions as module
from areal_ray.run.versions import BINDING, OtherVersions, check_versions, differences, versions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", BINDING)
def test_what_differs_on_a_node_is_named_with_both_versions(name):
    mine = {**versions(), name: "0.0.1"}
    with pytest.raises(OtherVersions) as caught:
        check_versions(versions(), mine, "node-b (10.0.0.2)")
    expected = f"node-b (10.0.0.2) has {name} 0.0.1 (the driver has {versions()[name]}): all nodes must have the same"
    assert str(caught.value) == expected
    assert differences(mine, versions()) == [f"{name} 0.0.1 (here {versions()[name]})"]


def test_all_that_differs_is_named_at_once():
    with pytest.raises(OtherVersions, match=r"has torch 1 \(the driver has 2\), ray 3 \(the driver has 4\): all"):
        check_versions({"torch": "2", "ray": "4"}, {"torch": "1", "ray": "3"}, "node")


def test_the_same_is_fine_and_so_is_what_does_not_change_a_run(monkeypatch):
    check_versions(versions(), versions(), "node")
    check_versions(versions(), {**versions(), "numpy": "0.0.1"}, "node")
    check_versions({"python": "3.11.7"}, {"python": "3.11.15"}, "node")
    check_versions({}, versions(), "node")  # a driver that does not say
    monkeypatch.setattr(module, "version", lambda package: "2.13.0+cu130")
    gpu = versions()
    monkeypatch.setattr(module, "version", lambda package: "2.13.0+cpu")
    check_versions(gpu, versions(), "node")


def test_a_package_that_is_not_there_is_missing(monkeypatch):
    def version(package):
        raise module.PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", version)
    assert versions()["torch"] == "missing"

"""Code of one's own: where it is looked for, and what is said if it is not there."""

import sys

import pytest

from areal_ray.config import ConfigError, load, plugin

from .test_config import TINY

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module, and a path and current folder that a test may change."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "parts_of_test_plugin.py").write_text("class A:\n    b = len\n")
    yield tmp_path
    sys.modules.pop("parts_of_test_plugin", None)


def test_it_is_looked_for_beside_the_experiment_and_in_the_current_folder(folder):
    path = plugin.search_path(str(folder / "inner" / "experiment.yaml"))
    assert path == (str(folder / "inner"), str(folder), "inner", ".")
    plugin.extend_path(path)
    assert sys.path[-2:] == [str(folder / "inner"), str(folder)]  # after all that is installed, and once
    assert plugin.resolve("parts_of_test_plugin:A.b", "key") is len


def test_an_experiment_elsewhere_has_no_relative_folder(folder):
    assert plugin.search_path("/elsewhere/experiment.yaml") == ("/elsewhere", str(folder), ".")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("parts_of_test_plugin", "is not of the form package.module:name"),
        ("parts of:x", "is not of the form package.module:name"),
        ("parts_of_test_plugin:A.c", "parts_of_test_plugin has no A.c"),
        ("parts_of_nowhere:A", "No module named 'parts_of_nowhere' (looked for parts_of_nowhere:A in "),
        ("broken_parts:A", "importing broken_parts failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_resolved_is_a_config_error_of_the_key(folder, name, part):
    (folder / "inner" / "broken_parts.py").write_text("1 / 0")
    plugin.extend_path([str(folder / "inner")])
    with pytest.raises(ConfigError) as caught:
        plugin.resolve(name, "model.factory")
    assert caught.value.key == "model.factory"
    assert part in caught.value.message
    if "nowhere" in name:
        assert str(folder / "inner") in caught.value.message


def test_what_cannot_be_called_or_fails_is_a_config_error(folder):
    with pytest.raises(ConfigError, match="is a str, and cannot be called"):
        plugin.factory("sys:prefix", "key", {})
    with pytest.raises(ConfigError, match="math:sqrt failed: ValueError"):
        plugin.call(plugin.factory("math:sqrt", "key", {}), "math:sqrt", "key", -1)
    assert plugin.factory("short", "key", {"short": len}) is len


def test_arguments_are_checked_without_a_call():
    plugin.check_args(print, "builtins:print", "key", 1, sep=" ")
    with pytest.raises(ConfigError, match=r"extend_path: missing a required argument: .folders.") as caught:
        plugin.check_args(plugin.extend_path, "extend_path", "key", folder=1)
    assert caught.value.key == "key"


def test_an_outage_passes_and_a_missing_file_is_a_mistake():
    def away():
        raise ConnectionError("no storage")

    with pytest.raises(ConnectionError):
        plugin.call(away, "away", "key")
    with pytest.raises(ConfigError, match="open failed: FileNotFoundError"):
        plugin.call(open, "open", "key", "/nothing/here")


def test_another_name_of_a_key_may_refer_to_others_and_stands_alone(monkeypatch):
    monkeypatch.setenv("MINE", "math:sqrt")
    assert load(TINY, ["optim.factory=${oc.env:MINE}"]).optim.name == "math:sqrt"
    with pytest.raises(ConfigError, match=r"optim\.factory: is another name of optim\.name, which is set beside it"):
        load(TINY, ["optim={factory: 'a:b', name: 'c:d'}"])


def test_another_name_of_a_key_is_that_key(tmp_path):
    assert load(TINY, ["optim.factory=math:sqrt"]).optim.name == "math:sqrt"
    with pytest.raises(
        ConfigError, match=r"command line: optim\.name: knows adamw, muon, adafactor, sgd, or package\.module:name"
    ):
        load(TINY, ["optim.factory=sqrt"])

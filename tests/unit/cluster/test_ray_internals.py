"""The wall around Ray: names of its internals stand in one file, and all of them are there in this Ray."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import ray
import ray._private.grpc_utils
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from areal_ray.cluster import ray_internals
from areal_ray.cluster.ray_checks import missing

pytestmark = pytest.mark.unit

PACKAGE = Path(ray_internals.__file__).parents[1]


def test_all_that_is_relied_on_is_in_this_ray():
    assert ray_internals.core_problems() == []
    assert ray_internals.train_problems() == []


def test_a_version_that_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    (problem,) = ray_internals.core_problems()
    assert problem == "Ray 2.61.0 is not one of those whose internals are known (2.60)"


def test_a_name_that_is_taken_away_is_said(monkeypatch):
    monkeypatch.delattr(ray._private.worker, "_worker_logs_enabled")
    assert ray_internals.core_problems() == ["ray._private.worker._worker_logs_enabled is missing"]


def test_a_parameter_that_is_renamed_is_said(monkeypatch):
    monkeypatch.setattr(ray._private.grpc_utils, "init_grpc_channel", lambda address, settings: None)
    assert ray_internals.core_problems() == ["ray._private.grpc_utils.init_grpc_channel takes no `options`"]


def test_a_method_of_ray_train_that_is_renamed_is_said(monkeypatch):
    monkeypatch.delattr(WorkerGroup, "_create_placement_group")
    place = "ray.train.v2._internal.execution.worker_group.WorkerGroup"
    assert ray_internals.train_problems() == [f"{place}._create_placement_group is missing"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("ray.train:ScalingConfig", "_resources_per_worker_not_none"),
        ("ray.train.torch:TorchConfig", "backend_cls"),
        ("ray.train.v2._internal.execution.worker_group:WorkerGroup", "execute_single"),
        ("ray.train.v2._internal.execution.worker_group:WorkerGroup", "get_resources_per_worker"),
        ("ray.train.v2._internal.execution.worker_group.state:WorkerGroupState", "num_workers"),
        ("ray.train.v2._internal.execution.worker_group.state:WorkerGroupState", "shutdown"),
    ],
)
def test_what_controller_uses_of_classes_that_it_extends_is_looked_at_too(monkeypatch, place, name):
    module, _, kind = place.partition(":")
    for each in getattr(import_module(module), kind).__mro__:
        if name in vars(each):
            monkeypatch.delattr(each, name)
    (problem,) = ray_internals.train_problems()
    assert problem.endswith(f"{name} is missing")


def test_a_module_a_class_a_field_or_an_attribute_of_instances_that_is_not_there_is_said():
    messages = "ray.core.generated.node_manager_pb2"
    assert missing({f"{messages}:PrestartWorkersRequest": "job_id nothing", "ray._nothing": "name"}) == [
        f"{messages}.PrestartWorkersRequest.nothing is missing",
        "ray._nothing cannot be imported (No module named 'ray._nothing')",
    ]
    assert missing({"ray.actor": "Nothing.method"}) == ["ray.actor.Nothing is missing"]
    group = "ray.train.v2._internal.execution.worker_group:WorkerGroup"
    assert missing({group: "_worker_group_state _nothing"}) == [f"{group.replace(':', '.')}._nothing is missing"]


def test_a_module_that_raises_and_a_callable_without_a_signature_are_said(tmp_path, monkeypatch):
    (tmp_path / "ray_moved.py").write_text("raise RuntimeError('ask for another module')\n")
    (tmp_path / "ray_changed.py").write_text("flag, compiled = True, type\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert missing({"ray_moved": "name", "ray_changed": "flag(a) compiled(b) later"}) == [
        "ray_moved cannot be imported (ask for another module)",
        "ray_changed.flag has no signature",
        "ray_changed.compiled has no signature",
        "ray_changed.later is missing",
    ]


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (
            r"_private|_raylet|core\.generated|internal_kv|ray\._common|ray\.train\._internal",
            ("cluster/ray_internals.py",),
        ),
        (r"ray\.train\.v2\._internal", ("cluster/ray_internals.py", "controller/")),
    ],
)
def test_names_of_ray_s_internals_stand_behind_the_wall(names, where):
    files = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if re.search(names, path.read_text())]
    assert files
    assert [name for name in files if not name.startswith(where)] == []

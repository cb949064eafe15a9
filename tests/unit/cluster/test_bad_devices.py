"""Which nodes a run leaves out for its devices, and how they come back."""

import pytest

from areal_ray.cluster import bad_devices
from areal_ray.cluster.bad_devices import UUID_UNKNOWN, BadDevice, BadNodes, DeviceName, left_out, readmit
from areal_ray.cluster.nodes import node_name
from areal_ray.run import RunDir
from areal_ray.run.versions import OtherVersions, versions
from areal_ray.storage import LocalStorage

pytestmark = pytest.mark.unit


def failed(node, uuid, failure):
    return {"event": "bad_device", "node": node, "uuid": uuid, "index": 0, "problem": "ECC", "failure": failure}


def again(node):
    return {"event": "readmitted", "node": node}


@pytest.mark.parametrize(
    ("events", "nodes"),
    [
        ([], []),
        ([failed("a", "1", 1)], []),
        ([failed("a", "1", 1), failed("a", "1", 2)], ["a"]),
        ([failed("a", "1", 1), failed("a", "2", 2)], ["a"]),  # the node fails, whichever device it is
        ([failed("a", "1", 1), failed("a", "2", 1)], []),  # at one start
        ([failed("a", "1", 1), failed("b", "2", 2)], []),
        ([failed("a", UUID_UNKNOWN, 1), failed("b", UUID_UNKNOWN, 2)], []),  # two devices
        ([failed("a", UUID_UNKNOWN, 1), failed("a", UUID_UNKNOWN, 2), again("b")], ["a"]),
        ([failed("a", "1", 1), failed("b", "1", 2)], ["b"]),  # the device under another host name
        ([failed("a", "1", 1), failed("a", "1", 2), again("a")], []),
        ([failed("a", "1", 1), failed("a", "1", 2), again("b")], ["a"]),
        ([failed("a", "1", 1), failed("a", "1", 2), again("a"), failed("a", "1", 3)], []),
        ([failed("a", "1", 1), again("a"), failed("a", "1", 3), failed("a", "1", 4)], ["a"]),
        ([failed("a", "1", 1), failed("b", "1", 2), again("b")], []),
    ],
)
def test_twice_since_it_was_taken_back(events, nodes):
    assert list(left_out([{"event": "saved"}, *events])) == nodes


def test_nodes_are_called_by_their_name_in_ray_else_by_their_host_name():
    node = {"NodeName": "10.0.0.7", "NodeManagerAddress": "10.0.0.7", "NodeManagerHostname": "host"}
    assert node_name(node) == "host"
    assert node_name({**node, "NodeName": "second"}) == "second"


@pytest.fixture
def run(tmp_path):
    return RunDir(LocalStorage(tmp_path))


def bad(node, uuid="GPU-1"):
    return BadDevice(DeviceName(node, "id", 3, uuid), "2 uncorrected ECC errors")


def nodes():
    return [{"NodeID": f"id-{name}", "NodeManagerHostname": name} for name in ("c", "b", "a")]


def test_a_node_is_left_out_after_its_second_failure_and_one_line_says_it(run):
    said = []
    known = BadNodes(run, said.append)
    assert known.record([ValueError()]) is False
    assert known.record([bad("a"), ValueError()]) is True
    assert (said, known.labels(nodes), known.explain()) == ([], None, "")
    known.record([bad("a")])
    (line,) = said
    assert line == (
        "a has failed twice and is left out from now on: GPU 3 (GPU-1): 2 uncorrected ECC errors; "
        "cluster.use_again='[a]' takes it back"
    )
    assert known.labels(nodes) == {"ray.io/node-id": "!in(id-a)"}
    known.record([bad("c", "GPU-2")])
    known.record([bad("c", "GPU-2")])
    assert known.labels(nodes) == {"ray.io/node-id": "!in(id-a,id-c)"}
    assert [event["node"] for event in run.events("bad_device")] == ["a", "a", "c", "c"]
    assert [event["node"] for event in run.events("left_out")] == ["a", "c"]


def test_without_a_bad_node_the_cluster_is_not_asked(run):
    assert BadNodes(run, print).labels(pytest.fail) is None


def test_the_next_submission_leaves_it_out_until_it_is_taken_back(run):
    first = BadNodes(run, print)
    first.record([bad("a")])
    first.record([bad("a")])
    said = []
    second = BadNodes(run, said.append)
    second.load()
    assert second.ids(nodes) == {"id-a"}
    assert "a is left out, as before" in said[0]
    readmit(run, ["a", "z"], said.append)
    assert said[1] == "a is used again, as cluster.use_again says"
    assert "z was not left out in this run; known are: ['a']" in said[2]
    third = BadNodes(run, print)
    third.load()
    assert third.ids(nodes) == set()
    third.record([bad("a")])
    assert third.ids(nodes) == set()


DRIVER = versions()


def strangers(*names):
    told = {name: f"{name} has torch 1 (the driver has 2): all nodes must have the same" for name in names}
    return OtherVersions(told, DRIVER, here=False)


def loaded(run):
    known = BadNodes(run, print)
    known.load()
    return known.ids(nodes)


def test_a_node_with_other_packages_is_left_out_at_once_if_the_run_has_trained_without_it(run, monkeypatch):
    said = []
    known = BadNodes(run, said.append)
    run.event("training", attempt=1)
    run.event("submitted", submission="x", versions=DRIVER)
    assert known.record([strangers("b")]) is False  # of this submission nothing has trained
    run.event("training", attempt=2)
    with monkeypatch.context() as upgraded:  # under the run, here as well
        upgraded.setattr(bad_devices, "versions", lambda: {**DRIVER, "torch": "1"})
        assert known.record([strangers("b")]) is False
    assert known.record([ValueError(), strangers("b"), strangers("b")]) is True
    assert known.ids(nodes) == {"id-b"}
    told = "b has torch 1 (the driver has 2): all nodes must have the same"
    assert said == [f"b is left out from now on: {told}; cluster.use_again='[b]' takes it back"]
    assert loaded(run) == {"id-b"}  # a controller that is started again
    run.event("submitted", submission="y", versions=DRIVER)
    assert loaded(run) == {"id-b"}  # the same driver again
    readmit(run, ["b"], print)
    assert loaded(run) == set()


def test_a_driver_with_other_packages_tries_all_nodes_again(run):
    run.event("submitted", submission="x", versions=DRIVER)
    run.event("training", attempt=1)
    BadNodes(run, print).record([strangers("b", "c")])
    assert loaded(run) == {"id-b", "id-c"}
    run.event("submitted", submission="y", versions={"torch": "1"})
    assert loaded(run) == set()


def test_a_ledger_that_cannot_be_written_now_changes_nothing(run, monkeypatch):
    known = BadNodes(run, print)

    def full(line):
        raise OSError("No space left on device")

    monkeypatch.setattr(run._events, "append", full)
    known.record([bad("a")])
    known.record([bad("a")])
    assert known.ids(nodes) == {"id-a"}

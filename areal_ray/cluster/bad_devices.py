"""Bad devices: the exception that names one, and the nodes that a run leaves out for them, or for other packages.

A node is known by its name (`nodes.node_name`), as its id in Ray is another one whenever `ray start` is repeated. The
ledger has it all: events `bad_device`, `other_versions`, `left_out` and `readmitted`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from areal_ray.cluster.nodes import node_name
from areal_ray.run import RunDir
from areal_ray.run.versions import OtherVersions, mismatch, versions

UUID_UNKNOWN = "UUID unknown"
_ENOUGH = 2  # failures of a node, or of one device, after which its node is left out
_NODE_LABEL = "ray.io/node-id"  # Ray gives it to every node


@dataclass(frozen=True)
class DeviceName:
    """Identity of a device.

    Args:
        node, node_id: name of its node, and the node's present id in Ray.
        index: as the driver numbers the devices of the node, where NVML is there to say so; else as this process does.
        uuid: stays with the device, wherever it is put.
        pci: its bus id, "" if not known.
    """

    node: str
    node_id: str
    index: int
    uuid: str
    pci: str = ""

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.uuid}{f', PCI {self.pci}' if self.pci else ''}) of {self.node}"


class BadDevice(RuntimeError):
    """A device that cannot be computed on, or not be trusted.

    Args:
        device: the device.
        problem: what is wrong with it.
    """

    def __init__(self, device: DeviceName, problem: str) -> None:
        super().__init__(device, problem)  # with which it is pickled
        self.device, self.problem = device, problem

    def __str__(self) -> str:
        return f"{self.device}, in Ray {self.device.node_id}: {self.problem}"


def left_out(events: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Find the nodes to leave out, and why.

    A node is left out when it has failed twice since it was last taken back, or when a device was seen there last that
    has failed twice: in a container the host name may be another one at every start. One with other packages than the
    driver is left out at once, for as long as drivers have the same.

    Args:
        events: of a run's ledger, oldest first.
    """
    failures: list[Mapping[str, Any]] = []
    mismatched: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == "bad_device":
            failures.append(event)
        elif event["event"] == "other_versions":
            mismatched[event["node"]] = event
        elif event["event"] == "submitted":
            now = event.get("versions")
            mismatched = {node: each for node, each in mismatched.items() if each["driver"] == now}
        elif event["event"] == "readmitted":
            mismatched.pop(event["node"], None)
            # And what its devices did elsewhere, or one that has moved would still count.
            devices = {_device(failure) for failure in failures if failure["node"] == event["node"]}
            failures = [each for each in failures if each["node"] != event["node"] and _device(each) not in devices]
    last = {_device(failure): failure for failure in failures}
    # Several devices of a node that fail at one start are one failure of the node.
    of_nodes = Counter(node for node, _ in {(each["node"], each["failure"]) for each in failures})
    of_devices = Counter(device for device, _ in {(_device(each), each["failure"]) for each in failures})
    found = {node for node, times in of_nodes.items() if times >= _ENOUGH}
    found |= {last[device]["node"] for device, times in of_devices.items() if times >= _ENOUGH}
    out = {node: _why(node, failures) for node in sorted(found)}
    return out | {node: event["problem"] for node, event in mismatched.items()}


def _device(failure: Mapping[str, Any]) -> str:
    """What tells the device from all others: one that failed before it could be asked has no UUID."""
    return failure["uuid"] if failure["uuid"] != UUID_UNKNOWN else f"{failure['node']} {failure['index']}"


def _why(node: str, failures: Sequence[Mapping[str, Any]]) -> str:
    newest = [each for each in failures if each["node"] == node][-1]
    return f"GPU {newest['index']} ({newest['uuid']}): {newest['problem']}"


class BadNodes:
    """The nodes that a run leaves out; kept in memory, so that the ledger is read once.

    Args:
        run: the run directory.
        say: prints a line for the user.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._events: list[dict[str, Any]] = []
        self._out: dict[str, str] = {}

    def load(self) -> None:
        """Read from the ledger what has been left out so far, and say it (OSError)."""
        kinds = ("bad_device", "other_versions", "readmitted", "submitted")
        self._events = [event for event in self._run.turning_points() if event["event"] in kinds]
        self._out = left_out(self._events)
        for node, why in self._out.items():
            self._say(f"{node} is left out, as before: {why}; {_way_back(node)}")

    def record(self, errors: Iterable[BaseException]) -> bool:
        """Write bad devices, and nodes with other packages, that workers have raised to the ledger; whether any count.

        Other packages count only in a run that has trained since it was submitted, while this process still has those
        of the driver. Else the run is to end: the driver is wrong, or packages were changed under the run, and what
        helps is to submit it again.
        """
        errors = list(errors)
        found = [error for error in errors if isinstance(error, BadDevice)]
        others = next((error for error in errors if isinstance(error, OtherVersions) and self._counts(error)), None)
        mismatched: dict[str, dict[str, Any]] = {}
        if others is not None:
            about = {"driver": others.driver}
            mismatched = {node: {"node": node, "problem": text} | about for node, text in others.nodes.items()}
        number = max((event.get("failure", 0) for event in self._events), default=0) + 1
        for error in found:
            fields = {**asdict(error.device), "problem": error.problem[:500], "failure": number}
            self._events.append({"event": "bad_device", **fields})
            self._run.note("bad_device", self._say, **fields)
        for fields in mismatched.values():
            self._events.append({"event": "other_versions", **fields})
            self._run.note("other_versions", self._say, **fields)
        before, self._out = self._out, left_out(self._events)
        for node in self._out.keys() - before.keys():
            failed = "" if node in mismatched else " has failed twice and"
            self._say(f"{node}{failed} is left out from now on: {self._out[node]}; {_way_back(node)}")
            self._run.note("left_out", self._say, node=node, why=self._out[node])
        return bool(found or mismatched)

    def _counts(self, others: OtherVersions) -> bool:
        if mismatch(others.driver, versions(), "here") is not None:
            return False
        kinds: list[str] = []
        with suppress(OSError):  # storage that is away: it ends, as if it had not trained
            kinds = [event["event"] for event in self._run.turning_points()]
        return [kind for kind in kinds if kind in ("submitted", "training")][-1:] == ["training"]

    def ids(self, nodes: Callable[[], Iterable[Mapping[str, Any]]]) -> set[str]:
        """Find the present ids of the nodes that are left out.

        Args:
            nodes: `ray.nodes`; asked only if there is something to leave out.
        """
        return {node["NodeID"] for node in nodes() if node_name(node) in self._out} if self._out else set()

    def labels(self, nodes: Callable[[], Iterable[Mapping[str, Any]]]) -> dict[str, str] | None:
        """Make the label selector that keeps workers off these nodes; None if there are none. Args as for `ids`."""
        ids = self.ids(nodes)
        return {_NODE_LABEL: f"!in({','.join(sorted(ids))})"} if ids else None

    def explain(self) -> str:
        """Say what is left out, why, and how it is taken back; "" if nothing is."""
        return "; ".join(f"{node} is left out ({why}): {_way_back(node)}" for node, why in self._out.items())


def readmit(run: RunDir, names: Iterable[str], say: Callable[[str], None]) -> None:
    """Take nodes back that were left out, by an event in the ledger.

    Args:
        run: the run directory.
        names: of the nodes; one that was not left out is passed over with a line.
        say: prints a line for the user.

    Raises:
        OSError: if the ledger can be neither read nor written.
    """
    names = list(names)
    kinds = ("bad_device", "other_versions")
    failed = {event["node"] for event in run.turning_points() if event["event"] in kinds} if names else set()
    for name in names:
        if name in failed:
            run.event("readmitted", node=name)
            say(f"{name} is used again, as cluster.use_again says")
        else:
            say(f"cluster.use_again: {name} was not left out in this run; known are: {sorted(failed) or 'none'}")


def _way_back(node: str) -> str:
    return f"cluster.use_again='[{node}]' takes it back"

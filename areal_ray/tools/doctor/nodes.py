"""Checks of the doctor on every node of a cluster: one small task on each."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from areal_ray.config import Config
from areal_ray.run.units import size_text
from areal_ray.run.versions import differences, versions
from areal_ray.storage import Storage
from areal_ray.tools.doctor.finding import Finding
from areal_ray.tools.doctor.levers import Estimate
from areal_ray.tools.doctor.limits import OPEN_FILES, limits
from areal_ray.tools.doctor.memory import MemoryEstimate, estimate

_CLOCK_S = 2.0  # a lease and a ledger bear that much
_WAIT_S = 60.0
_NO_ANSWER = "`ray status` says whether it is alive and has room; restart Ray there, or take it out"
_NO_PACKAGE = "Install it there in the same environment as here, or have the job take it along (`areal-ray submit`)"
_NOT_SHARED = (
    "does not show what the driver has written there: it is not shared. Mount one file system at that path on every "
    "node, or give run.storage_path=s3://..."
)


def look(storage: Storage, name: str, mark: str) -> dict[str, Any]:
    """What there is to know of the node of this process.

    Args:
        storage: of run.storage_path.
        name: of a file in it that the driver has written.
        mark: its content.
    """
    try:
        found = storage.read(name) if storage.size(name) is not None else b""
        own = f"{name}-{secrets.token_hex(4)}"
        storage.replace(own, b"")
        storage.remove(own)
        trouble = "" if found == mark.encode() else _NOT_SHARED
    except OSError as error:
        trouble = str(error)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "versions": versions(),
        "time": time.time(),
        "trouble": trouble,
        "limits": [(each.what, each.text) for each in limits() if each.state != "ok"],
        "memory": memory,
        "gpus": gpus(),
    }


def gpus() -> list[int]:
    """Bytes of each GPU of this node, by nvidia-smi: this process, which reserves none, is shown none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) << 20 for line in told.split() if line.isdigit()]


def node_findings(config: Config, storage: Storage, needs: Estimate = estimate) -> Iterator[Finding]:
    """What can be found on the nodes of the cluster that this process is connected to.

    Args:
        config: checked.
        storage: of run.storage_path.
        needs: memory of one rank of so many.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from areal_ray.cluster.nodes import node_name

    name, mark = f".areal_ray-doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    storage.replace(name, mark.encode())
    try:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        began = time.time()
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[task.options(scheduling_strategy=there).remote(storage, name, mark)] = node
        yield _resources(config, list(nodes.values()))
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT_S)
        for answer in late:
            yield Finding(
                "bad", node_name(nodes[asked[answer]]), f"has not answered within {_WAIT_S:.0f} s: {_NO_ANSWER}"
            )
        here, least = versions(), needs(config, config.usable_sizes[0])
        for answer in ready:
            who = node_name(nodes[asked[answer]])
            try:
                found = ray.get(answer)
            except ray.exceptions.RayError as error:
                text = str(error).strip().splitlines()[-1][:200]
                yield Finding("bad", who, f"cannot run a task of this package: {text}. {_NO_PACKAGE}")
                continue
            yield from _of_node(who, found, here, storage.location, began, time.time())
            yield from _memory(who, _room(config, nodes[asked[answer]]), found, config, least)
    finally:
        storage.remove(name)


def _resources(config: Config, nodes: list[dict[str, Any]]) -> Finding:
    """Whether there is room for the least number of workers."""
    each = {name: amount for name, amount in config.worker_resources.items() if amount > 0}
    room = sum(_room(config, node) for node in nodes)
    least, most = config.usable_sizes[0], config.usable_sizes[-1]
    wanted = f"{least} to {most}" if most > least else f"{least}"
    text = f"{len(nodes)} with room for {room} workers of {each}; the run takes {wanted}"
    if room < least:
        text += ": add nodes, or a smaller cluster.num_workers or cluster.resources_per_worker"
    return Finding("ok" if room >= least else "bad", "nodes", text)


def _room(config: Config, node: dict[str, Any]) -> int:
    """The number of workers that a node has room for, by its resources."""
    each = {name: amount for name, amount in config.worker_resources.items() if amount > 0}
    return int(min(node["Resources"].get(name, 0) // amount for name, amount in each.items()))


def _memory(who: str, room: int, found: dict[str, Any], config: Config, needs: MemoryEstimate) -> Iterator[Finding]:
    """What a node has of memory, beside what as many workers take as it has room for.

    Args:
        who: the node.
        room: workers, by its resources.
        found: on it, as `look` says.
        config: of the run.
        needs: of one worker, where there are the fewest.
    """
    workers = min(room, config.usable_sizes[-1])
    device, host = sum(needs.device.values()), sum(needs.host.values())
    each = host if config.cluster.use_gpu else host + device
    if not workers or "memory" not in found:  # of another version of this package
        return
    smallest = min(found["gpus"], default=None)
    if config.cluster.use_gpu and smallest is not None:
        text = f"a worker takes about {size_text(device)}, and the smallest GPU has {size_text(smallest)}"
        yield Finding("ok" if device < smallest else "bad", who, text)
    text = f"{workers} workers take about {size_text(workers * each)} of its {size_text(found['memory'])}"
    fits = workers * each < found["memory"]
    yield Finding("ok" if fits else "note" if each < found["memory"] else "bad", who, text)


def _of_node(
    who: str, found: dict[str, Any], here: dict[str, str], place: str, began: float, ended: float
) -> Iterator[Finding]:
    wrong = differences(found["versions"], here)
    if wrong:
        text = f"other versions than here: {', '.join(wrong)}. Give all nodes and the driver one image or environment"
        yield Finding("bad", who, text)
    if found["trouble"]:
        yield Finding("bad", who, f"{place} {found['trouble']}")
    apart = max(began - found["time"], found["time"] - ended, 0.0)
    if apart > _CLOCK_S:
        text = f"its clock is {apart:.0f} s from this one: times in logs will not fit each other. Set both by NTP"
        yield Finding("note", who, text)
    for what, text in found.get("limits", ()):  # not told by other versions of this package
        yield Finding("bad" if what == OPEN_FILES else "note", who, f"{what}: {text}")
    if not wrong and not found["trouble"]:
        yield Finding("ok", who, "same versions, sees the storage")

"""Who has killed a process for lack of memory, by the word of the kernel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from areal_ray.cluster.failures import Cause
from areal_ray.run import RunDir

_LIMIT_S = 10.0  # of the question to another node
# mm/oom_kill.c: "Out of memory: Killed process 1 (name) total-vm:1kB, anon-rss:1kB, ...", or "Memory cgroup out of ..."
_KILLED = re.compile(r"(Memory cgroup out|Out) of memory: Killed process (\d+) .*?anon-rss:(\d+)kB", re.I)


def kernel_log() -> str:
    """The kernel's messages; empty where they may not be read."""
    try:
        read = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return read.stdout


def cgroup_kills(path: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    """Processes of this container that the kernel has killed for its limit of memory; 0 where nobody counts."""
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def kernel_says(pid: int, log: Callable[[], str] = kernel_log, kills: Callable[[], int] = cgroup_kills) -> str | None:
    """A sentence about the kernel's killing of a process of this node for lack of memory; None if it says nothing.

    Args:
        pid: of the process.
        log, kills: ask the kernel; a container that sees other process ids than the kernel has the count only.
    """
    for whose, killed, resident in _KILLED.findall(log()):
        if int(killed) == pid:
            limit = "its container's limit" if whose.lower().startswith("memory cgroup") else "the machine"
            return f"the kernel has killed it when it had {int(resident) / 1e6:.1f} GB, as memory of {limit} ran out"
    count = kills()
    if count:
        processes = f"{count} process{'es' * (count > 1)}"
        return f"since its container was started the kernel has killed {processes} there to make room, perhaps this one"
    return None


def ask_node(address: str, pid: int) -> str | None:
    """Ask `kernel_says` on the node with an IP address; None if it is not there, or does not answer in time."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == address]
        if not nodes:
            return None
        there = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(kernel_says).options(scheduling_strategy=there)
        answer: str | None = ray.get(task.remote(pid), timeout=_LIMIT_S)
    except (RayError, GetTimeoutError, RuntimeError, ValueError):  # there is a panel to be shown without it
        return None
    return answer


def with_killer(cause: Cause, run: RunDir, ask: Callable[[str, int], str | None] = ask_node) -> Cause:
    """The cause of a failure; that of a process which was gone without a word with what the kernel says of it.

    Args:
        cause: of the failure.
        run: its ledger has the process ids.
        ask: asks a node of an IP address about a process.
    """
    if not cause.is_death or cause.rank is None or "lack of memory" in cause.message:
        return cause
    attempt = None
    with suppress(OSError):  # the storage may be why it failed
        attempt = run.newest("attempt")
    pids = attempt.get("pids", []) if attempt else []
    said = ask(cause.node, pids[cause.rank]) if cause.rank < len(pids) else None
    return replace(cause, message=f"{cause.message}; {said}") if said else cause

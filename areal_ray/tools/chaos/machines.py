"""Machines of one's own on this one: network namespaces with an address each on a bridge, and a Ray node in each.

Every machine has its own network, mounts, process numbers and host name, its own /tmp, /dev/shm, HOME and /etc/hosts,
as Debian writes it (the host name is 127.0.1.1). Files outside /tmp are those of this machine, and one folder is shared
by all at the same path. Takes root; everything ends with the block, or with this process.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import psutil

_CODE = Path(__file__).parents[3]  # of this package, which the machines see as well
BIN = Path(sys.executable).parent
PORT = 6379  # of the head node's store, which no other process of that machine has
_READY_S = 180.0  # on a busy machine, too
_TOOLS = ("ip", "unshare", "nsenter", "mount")  # of iproute2, util-linux and mount
_ANY_LINK = "rate 1mbit burst 64kb latency 1ms"  # to see whether it can be
# The first process of a machine: reads until its standard input is closed, and collects the dead meanwhile.
_INIT = """set -e
mount -t tmpfs tmpfs /mnt
{keep}
mount --move /mnt /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/home
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /tmp/hosts
printf 'nameserver 127.0.0.1\\n' > /tmp/resolv.conf
mount --bind /tmp/hosts /etc/hosts
mount --bind /tmp/resolv.conf /etc/resolv.conf
hostname {name}
ip link set lo up
exec 3<&0
cat <&3 >/dev/null &
echo ready
wait $!
"""


def impossible() -> str | None:
    """Why there can be no machines here; None if there can."""
    if os.geteuid() != 0:
        return "takes root, for network namespaces"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(missing)} here (of iproute2 and util-linux)"
    name = f"ar{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def no_slow_links() -> str | None:
    """What a slow link lacks here, where there can be machines; None if nothing."""
    if shutil.which("tc") is None:
        return "tc, of iproute2"
    name = f"ar{secrets.token_hex(3)}"
    _ip("netns", "add", name)
    try:
        command = ["tc", "-n", name, "qdisc", "replace", "dev", "lo", "root", "tbf", *_ANY_LINK.split()]
        made = subprocess.run(command, capture_output=True, check=False)
    finally:
        _ip("netns", "del", name)
    return "the kernel's token bucket filter, sch_tbf" if made.returncode else None


def _keep(shared: Path) -> str:
    """Commands that bring what must be seen, and lies in /tmp, to the new one: shared and present folder, this code."""
    places = [place.resolve() for place in (shared, Path.cwd(), _CODE, Path(sys.prefix))]
    kept = [place.relative_to("/tmp") for place in places if Path("/tmp") in place.parents]
    within = [place for place in kept if not any(place != other and place.is_relative_to(other) for other in kept)]
    names = [shlex.quote(str(place)) for place in within]
    return "\n".join(f"mkdir -p /mnt/{name}; mount --bind /tmp/{name} /mnt/{name}" for name in names) or "true"


class Machine:
    """One machine; made by `Machines`.

    Args:
        name: its host name.
        address: its address on the bridge.
        space: its network namespace, whose end on the bridge is called `link`.
        shared: the folder that all machines share.
    """

    def __init__(self, name: str, address: str, space: str, link: str, shared: Path) -> None:
        self.name, self.address, self._space, self._link = name, address, space, link
        command = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "--pid", "--ipc", "--fork"]
        script = _INIT.format(keep=_keep(shared), name=name)
        self._init = subprocess.Popen(
            [*command, "--mount-proc", "--kill-child", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare's own words when its child is killed
        )
        assert self._init.stdout is not None
        started = self._init.stdout.readline()
        assert started == b"ready\n", f"machine {name} has not started"
        (first,) = psutil.Process(self._init.pid).children()
        self._first, self._own = first.pid, {each.pid for each in first.children()}
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, *command: str | Path, log: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a command here, in the present folder, whose path is the same.

        What it prints, errors among it, goes to its `stdout` unless there is a file for it.
        """
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AREAL_"))}
        own |= {"HOME": "/tmp/home", "PATH": f"{BIN}:{own['PATH']}", "TMPDIR": "/tmp"}
        own["PYTHONPATH"] = os.pathsep.join([str(_CODE), *filter(None, [own.get("PYTHONPATH")])])
        own |= {"RAY_worker_niceness": "0", "PYTHONUNBUFFERED": "1", **environment}
        enter = ["nsenter", "--target", str(self._first), "--all"]
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd())]  # nsenter's own --wd does not know a new /tmp
        with contextlib.ExitStack() as stack:
            out = subprocess.PIPE if log is None else stack.enter_context(open(log, "ab"))
            process = subprocess.Popen(
                [*enter, *command], env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True
            )
        self._processes.append(process)
        return process

    def call(self, *command: str | Path, **environment: str) -> str:
        """Run a command here to its end, which must be a good one; what it printed."""
        process = self.run(*command, log=None, **environment)
        text = process.communicate()[0]
        assert process.returncode == 0, text
        return text

    def cut(self) -> None:
        """Pull its network cable: nothing is told to anybody."""
        subprocess.run(["ip", "link", "set", self._link, "down"], check=True)

    def mend(self) -> None:
        """Put the cable back."""
        subprocess.run(["ip", "link", "set", self._link, "up"], check=True)

    def slow(self, how: str) -> None:
        """Have its network take time in both directions.

        Args:
            how: parameters of the kernel's token bucket filter, see tc-tbf(8).
        """
        for place in self._ends:
            subprocess.run([*place, "root", "tbf", *how.split()], check=True)

    def fast(self) -> None:
        """Take back what `slow` has done, at whichever end."""
        for place in self._ends:
            command = [*(word if word != "replace" else "del" for word in place), "root"]
            subprocess.run(command, capture_output=True, check=False)

    @property
    def _ends(self) -> list[list[str]]:
        """Commands for what leaves at both ends of its cable."""
        own = ["tc", "-n", self._space, "qdisc", "replace", "dev", "eth0"]
        return [own, ["tc", "qdisc", "replace", "dev", self._link]]

    def processes(self) -> list[psutil.Process]:
        """All that run here, by the numbers that this process knows them by."""
        started = [each.pid for each in self._processes if each.poll() is None]
        found = list[psutil.Process]()
        for pid in (self._first, *started):  # Ray's own belong to the first when their parent is gone
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                found += psutil.Process(pid).children(recursive=True)
        return [each for each in found if each.pid not in self._own]

    def process(self, pid: int) -> psutil.Process | None:
        """The process that has this number here; None if there is none."""
        for each in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                status = Path(f"/proc/{each.pid}/status").read_text()
                if re.search(rf"^NSpid:.*\t{pid}$", status, re.M):
                    return each
        return None

    def off(self) -> None:
        """Switch it off: every process ends at once, and none says a word to others."""
        self.cut()
        self.end()

    def end(self) -> None:
        if self._init.poll() is None:
            psutil.Process(self._first).kill()  # and the kernel ends all others of these process numbers
        processes: list[subprocess.Popen[Any]] = [self._init, *self._processes]
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes.clear()


class Machines:
    """So many machines on one bridge, at 10.77.X.1 and so on, while the block lasts. The first is the head.

    Args:
        count: how many.
        shared: a folder of this machine that all of them have at the same path.
    """

    def __init__(self, count: int, shared: Path) -> None:
        self._count, self._shared = count, shared.resolve()
        self._id = secrets.token_hex(3)
        self._bridge, self._heads = f"ar{self._id}", 0
        self._machines: list[Machine] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machines:
        with contextlib.ExitStack() as stack:
            _ip("link", "add", self._bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", self._bridge)
            _ip("link", "set", self._bridge, "up")
            self._stack = stack.pop_all()
        try:
            for _ in range(self._count):
                self.add()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @overload
    def __getitem__(self, i: int) -> Machine: ...

    @overload
    def __getitem__(self, i: slice) -> list[Machine]: ...

    def __getitem__(self, i: int | slice) -> Machine | list[Machine]:
        return self._machines[i]

    def add(self) -> Machine:
        """One more machine, with an address of its own."""
        self._machines.append(self._start(len(self._machines), len(self._machines)))
        return self._machines[-1]

    def another_head(self) -> None:
        """A head in the place of the first, which is off: with its address and its node of Ray, and nothing else."""
        self._heads += 1
        self._machines[0] = self._start(0, f"0h{self._heads}")
        self.start_head(self._head_cpus, **self._head_environment)

    @property
    def head(self) -> Machine:
        return self._machines[0]

    @property
    def ray_address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def start_ray(self, cpus: Sequence[int], **environment: str) -> list[subprocess.Popen[str]]:
        """Start a node of Ray on each, and wait until all are there; the processes of those beside the head.

        Args:
            cpus: of each node.
            environment: of the nodes' processes.
        """
        self.start_head(cpus[0], **environment)
        others = zip(self._machines[1:], cpus[1:], strict=True)
        joined = [self.join(machine, count, **environment) for machine, count in others]
        self.wait_for_nodes(len(cpus))
        return joined

    def start_head(self, cpus: int, **environment: str) -> subprocess.Popen[str]:
        self._head_cpus, self._head_environment = cpus, environment
        options = [f"--port={PORT}", "--dashboard-host=0.0.0.0"]
        return self._ray_start(self.head, cpus, "--head", *options, **environment)

    def join(self, machine: Machine, cpus: int, **environment: str) -> subprocess.Popen[str]:
        return self._ray_start(machine, cpus, f"--address={self.ray_address}", **environment)

    def wait_for_nodes(self, count: int) -> None:
        code = f"""import time, ray
ray.init(address="{self.ray_address}", logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < {count}: time.sleep(0.1)
"""
        self.head.call("timeout", str(int(_READY_S)), sys.executable, "-c", code)

    def _ray_start(self, machine: Machine, cpus: int, *options: str, **environment: str) -> subprocess.Popen[str]:
        common = ["--block", "--disable-usage-stats", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        where = [f"--node-ip-address={machine.address}", f"--node-name={machine.name}"]
        log = self._shared / f"{machine.name}.log"
        return machine.run(BIN / "ray", "start", *common, *where, *options, log=log, **environment)

    def _start(self, i: int, which: int | str) -> Machine:
        """Machine number `i`, whose network is told by `which` from that of others that had the number."""
        bridge, stack = self._bridge, self._stack
        space, link, inner = f"ar{self._id}-{which}", f"ar{self._id}-{which}", f"an{self._id}-{which}"
        net = int(self._id[:2], 16)
        address = f"10.77.{net}.{i + 1}"
        _ip("netns", "add", space)
        stack.callback(_ip, "netns", "del", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", inner)
        stack.callback(_ip, "link", "del", link)  # or it stays for as long as a connection of a machine is not over
        # Known by neighbours: one with the address of another has its hardware address, too.
        _ip("link", "set", inner, "address", f"02:00:0a:4d:{net:02x}:{i + 1:02x}")
        _ip("link", "set", inner, "netns", space)
        _ip("link", "set", link, "master", bridge, "up")
        inside = ("-n", space)
        _ip(*inside, "link", "set", inner, "name", "eth0")
        _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        machine = Machine(f"node{i}", address, space, link, self._shared)
        stack.callback(machine.end)
        return machine


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)

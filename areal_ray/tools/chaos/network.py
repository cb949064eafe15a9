"""The run on machines with a network between them, and what happens there: to cables, links, nodes, the head."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import psutil

from areal_ray.tools.chaos import faults
from areal_ray.tools.chaos.kinds import Kind
from areal_ray.tools.chaos.machines import Machine, Machines, no_slow_links
from areal_ray.tools.chaos.world import World

_SLOW_S = 20.0
_SLOW = "rate 100mbit burst 64kb latency 100ms"  # what waits longer is dropped: every large message loses packets
_AWAY_S = 2.0  # until there is another head, as where a cluster's manager brings one


class Network(World):
    """A run whose driver is on the head, without a worker, and whose workers have a machine each.

    A node of Ray that ends is started again, as systemd or Kubernetes do it. Storage is a folder that all see, also
    those whose cable is pulled. Arguments as of World.
    """

    def _start_cluster(self) -> None:
        self._lock = threading.Lock()
        self.machines = Machines(1 + self._workers, self._folder)
        with ExitStack() as stack:  # what has begun ends if the rest does not come about
            stack.enter_context(self.machines)
            joined = self.machines.start_ray([0] + [1] * self._workers)
            stack.pop_all()
        self._nodes: dict[Machine, subprocess.Popen[str]] = dict(zip(self.machines[1:], joined, strict=True))

    def _end_cluster(self) -> None:
        self.machines.__exit__(None, None, None)

    def start_driver(self) -> None:
        head = self.machines.head
        self.driver = head.run(*self._command, log=self.log, RAY_ADDRESS=self.machines.ray_address)
        self._drivers.append(self.driver)

    def end_driver(self) -> int:
        assert self.driver is not None
        for each in psutil.Process(self.driver.pid).children():  # nsenter hands no signal on
            each.send_signal(signal.SIGTERM)
        return self.await_end(self.driver)

    def workers(self) -> list[int]:
        attempt = self.run.events("attempt")[-1]
        by_name = {machine.name: machine for machine in self._nodes}
        places = [(by_name.get(name), pid) for name, pid in zip(attempt["nodes"], attempt["pids"], strict=True)]
        found = [machine.process(pid) for machine, pid in places if machine is not None]
        return [each.pid for each in found if each is not None]

    def of_a_worker(self, draw: random.Random) -> Machine:
        """A machine that has one."""
        names = set(self.run.events("attempt")[-1]["nodes"])
        return draw.choice([machine for machine in self._nodes if machine.name in names] or list(self._nodes))

    def another(self) -> None:
        """One more machine joins."""
        machine = self.machines.add()
        with self._lock:
            self._nodes[machine] = self.machines.join(machine, 1)

    def without(self, machine: Machine) -> None:
        """It is no longer looked after."""
        with self._lock:
            del self._nodes[machine]

    def replace_head(self) -> None:
        """The head is off, with the driver on it; another one gets its address, and another driver.

        The driver starts when the head answers, as a job that is submitted to it does: it waits for seconds only.
        """
        self.hit()
        self.machines.head.off()
        time.sleep(_AWAY_S)
        self.machines.another_head()
        self.machines.wait_for_nodes(1)
        self.start_driver()

    def _look(self) -> None:
        super()._look()
        with self._lock:
            for machine, node in self._nodes.items():
                if node.poll() is not None:
                    self._nodes[machine] = self.machines.join(machine, 1)


def _away(
    seconds: float, which: Callable[[Network, random.Random], Machine], world: Network, draw: random.Random
) -> None:
    """A cable is pulled and put back."""
    machine = which(world, draw)
    world.hit()
    machine.cut()
    try:
        time.sleep(seconds)
    finally:
        machine.mend()


def _for_good(world: Network, draw: random.Random) -> None:
    """A cable is pulled; the run goes on elsewhere, while what is cut off lives on, until it is switched off."""
    world.another()
    machine, attempts = world.of_a_worker(draw), world.count("attempt")
    world.without(machine)
    world.hit()
    machine.cut()
    world.until("an attempt elsewhere", lambda: world.count("attempt") > attempts)
    machine.off()


def _off(world: Network, draw: random.Random) -> None:
    """A machine is switched off, and another one comes."""
    machine = world.of_a_worker(draw)
    world.without(machine)
    world.hit()
    machine.off()
    world.another()


def _slow(world: Network, draw: random.Random) -> None:
    """A link is slow and loses packets for a while; nobody has to start again."""
    machine = world.of_a_worker(draw)
    world.hit()
    try:
        machine.slow(_SLOW)
        time.sleep(_SLOW_S)
    finally:
        machine.fast()


NETWORK_KINDS: dict[str, Kind] = {
    "SIGKILL of a worker": Kind(partial(faults.one, signal.SIGKILL)),
    "a link is down for 10 s": Kind(partial(_away, 10.0, Network.of_a_worker), quiet=True),
    "a link is down for 60 s": Kind(partial(_away, 60.0, Network.of_a_worker), quiet=True),
    "a link is down for good": Kind(_for_good),
    "the head is cut off for 10 s": Kind(partial(_away, 10.0, lambda world, _: world.machines.head), quiet=True),
    "a link is slow and lossy for 20 s": Kind(_slow, lambda _: no_slow_links(), quiet=True),
    "a node is off without a word": Kind(_off),
    "another head has its address": Kind(lambda world, _: world.replace_head()),
}

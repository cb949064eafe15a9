"""Faults of single processes around a run: stopped or killed, whatever they are for."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from areal_ray.tools.chaos.world import World

_STOPPED_S = 5.0  # shorter than anything waits before it counts as dead
_LEASE_S = 20.0  # longer than a driver's lease lasts without it
FIRST_SECONDS = range(10)


def send(number: signal.Signals, find: Callable[[World], set[int]], world: World, draw: random.Random) -> None:
    """Send a signal to all of these processes."""
    for pid in find(world):
        world.send(pid, number)


def stop(find: Callable[[World], set[int]], world: World, draw: random.Random) -> None:
    """Stop processes for a few seconds; nobody is to mind."""
    pids = find(world)
    for pid in pids:
        world.send(pid, signal.SIGSTOP)
    try:
        time.sleep(_STOPPED_S)
    finally:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).resume()


def then_a_worker(find: Callable[[World], set[int]], world: World, draw: random.Random) -> None:
    """Helpers of the workers die, and then a worker, which would have needed them."""
    pids = find(world)
    for pid in pids:
        world.send(pid, signal.SIGKILL)
    if pids:
        world.kill(draw.choice(world.workers()))


def node(find: Callable[[World], set[int]], world: World, draw: random.Random) -> None:
    """A process without which a node cannot be dies; another node comes."""
    send(signal.SIGKILL, find, world, draw)
    world.change_node()


def head(world: World, draw: random.Random) -> None:
    """The cluster's own process dies: the driver ends, and is started on another cluster."""
    send(signal.SIGKILL, World.gcs, world, draw)
    assert world.driver is not None
    world.await_end(world.driver)
    world.change_cluster()
    world.start_driver()


def stop_driver(world: World, draw: random.Random) -> None:
    stop(World.drivers, world, draw)


def take_over(world: World, draw: random.Random) -> None:
    """The driver is stopped for longer than its lease lasts, another takes over, and it wakes up then."""
    old = world.driver
    assert old is not None
    world.send(old.pid, signal.SIGSTOP)
    try:
        time.sleep(_LEASE_S)
        attempts = world.count("attempt")
        world.start_driver()
        world.until("an attempt of another driver", lambda: world.count("attempt") > attempts)
    finally:
        old.send_signal(signal.SIGCONT)
    world.await_end(old)


def group(number: signal.Signals, world: World, draw: random.Random) -> None:
    """A signal to the driver's process group, as job schedulers send it: it saves and ends, and is started anew."""
    assert world.driver is not None
    world.send_to_group(number)
    world.await_end(world.driver)
    world.start_driver()


def early(second: int, world: World, draw: random.Random) -> None:
    """The driver dies, and the one that takes its place in one of its first seconds, with a worker if there is one."""
    world.restart_driver()
    time.sleep(second + draw.random())
    for pid in sorted(world.processes("ray::RayTrainWorker"))[:1]:
        world.kill(pid)
    world.restart_driver()

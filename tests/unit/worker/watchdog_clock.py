"""A watchdog under a clock that the test moves."""

from areal_ray.config import WatchdogConfig

LIMITS = WatchdogConfig(factor=10.0, floor_s=8.0, connect_s=30.0, patience_s=100.0)
SOON = WatchdogConfig(factor=1.0, floor_s=0.1, patience_s=0.1)
LONG = 60  # seconds after which a test has failed
TICK_S = 0.25
COLLECTIVE = "/x/site-packages/torch/distributed/distributed_c10d.py"
KERNEL = "/x/site-packages/torch/nn/functional.py"
OWN = "/home/me/model.py"


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def watch(dog, clock, seconds, happens=None):
    """Look as the watchdog's thread does, for so long.

    Args:
        happens: what the watched thread does meanwhile, by the second.

    Returns:
        After how many seconds the process was ended; None if it was not.
    """
    began, happens = clock.now, dict(happens or {})
    last = began
    while clock.now - began <= seconds:
        clock.now += TICK_S
        for at in [at for at in happens if began + at <= clock.now]:
            happens.pop(at)()
        if dog.look(clock.now, clock.now - last):
            return clock.now - began
        last = clock.now
    return None


def go_through(dog, clock, *phases):
    for phase, seconds in phases:
        dog.beat(phase)
        clock.now += seconds
    dog.beat(phases[-1][0])

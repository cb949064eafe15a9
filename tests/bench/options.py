"""What the command line asks of every part."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """Args:
    rounds: of every arm in turn.
    only: names of arms, if not all.
    seconds: how long a run under kills lasts (goodput, losses).
    saves: steps between two saves of arms that do not save as often as the others (goodput).
    model: overrides of the experiment that make it larger (restart, saves); none: what the part has otherwise.
    """

    rounds: int
    only: tuple[str, ...] = ()
    seconds: float = 300.0
    saves: Mapping[str, int] = field(default_factory=dict)
    model: tuple[str, ...] = ()

    @staticmethod
    def order(names: Sequence[str], number: int) -> list[str]:
        """The arms of a round: there and back again, so that a machine that drifts favours none."""
        return list(names) if number % 2 == 0 else list(names)[::-1]


def arm_and_steps(text: str) -> tuple[str, int]:
    """Of one of --saves: an arm and how many steps lie between its saves."""
    arm, _, steps = text.partition("=")
    if not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: an arm and how many steps lie between its saves, as areal_ray=5")
    return arm, int(steps)

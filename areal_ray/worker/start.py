"""One start of the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from areal_ray.checkpoint import Catalog
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir


@dataclass(frozen=True)
class Start:
    """One start of the workers, as seen by one rank.

    Args:
        attempt: its number.
        run: the run directory.
        ranks: all ranks.
        say: prints a line for the user; silent on all ranks but the first.
        catalog: the run's checkpoints.
    """

    attempt: int
    run: RunDir
    ranks: Ranks
    say: Callable[[str], None]
    catalog: Catalog

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes to the run's files."""
        return self.ranks.rank == 0

    def left_out_steps(self) -> list[int]:
        """Steps that earlier attempts did not take: this one, which may begin before them, does not either."""
        events = self.run.turning_points()
        bad = [event["step"] for event in events if event["event"] == "bad_step" and event.get("action") != "stop"]
        return bad + [event["step"] for event in events if event["event"] == "poison_step"]

    def record_samples(self, first: int, ids: list[int]) -> None:
        """Write down the numbers of a global batch's sequences."""
        try:
            self.run.log_samples(first, ids)
        except OSError as error:  # it goes with the next one
            self.say(f"could not write the sample ids from {first} on: {error}")

"""What makes a run resumable, dumped and loaded as one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from areal_ray.checkpoint import Catalog, Entry, load, save
from areal_ray.ranks import RankError, Ranks


class RecoverHandler:
    """Dumps and loads a set of named `Stateful` objects: engine, data cursor, progress, clocks.

    After AReaL's recover handler, with DCP as the only format: every dump is a directory of its own, and a load takes
    the newest one that proves to be good.

    Args:
        catalog: the run's checkpoints.
        state: what makes the run resumable, by name.
        attempt: number of this start of the workers, part of the names of its dumps.
        info: about the run, for the manifest.
        ranks: all ranks.
        warn: called on rank 0 with (checkpoint, reason) for each one that is passed over.
    """

    def __init__(
        self,
        catalog: Catalog,
        state: Mapping[str, Stateful],
        attempt: int,
        info: Mapping[str, Any],
        ranks: Ranks,
        warn: Callable[[str, str], None],
    ) -> None:
        self._catalog, self._state, self._attempt, self._info = catalog, state, attempt, info
        self._ranks, self._warn = ranks, warn

    def dump(self, step: int) -> str:
        """Save everything; durable and committed on return. A collective.

        Returns:
            The name of the checkpoint in the run directory.

        Raises:
            RankError: on every rank, if one could not write.
        """
        name = self._catalog.name(step, self._attempt)
        info = {**self._info, "step": step, "attempt": self._attempt}
        save(self._catalog.directory(name), self._state, info, self._ranks)
        return name

    def load(self) -> str | None:
        """Restore the newest good checkpoint. A collective.

        Damage is found on any rank and agreed by all; then the next older one is tried, with a warning.

        Returns:
            The name of what was restored; None if the run has no checkpoint.

        Raises:
            RuntimeError: if there are checkpoints but none is good: starting over would hide the loss.
            ValueError: if the newest good one is of another model or other data.
        """
        entries: list[Entry] = self._ranks.on_first(lambda: list(self._catalog.entries()))
        committed = 0
        for entry in entries:
            problem = entry.problem
            committed += "never finished" not in (problem or "")
            if problem is None:
                try:
                    load(self._catalog.directory(entry.name), self._state, self._ranks)
                    return entry.name
                except RankError as error:
                    if "CheckpointDamaged" not in str(error):
                        raise
                    problem = str(error)
            if self._ranks.rank == 0:
                self._warn(entry.name, problem)
        if committed:
            raise RuntimeError(f"none of the {committed} checkpoints of this run can be read; not starting over")
        return None

"""Bringing a run to its latest good state: the same road at the start of an attempt and at a rollback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from areal_ray.checkpoint import Catalog, Copy, Entry, StoredState
from areal_ray.distributed import Ranks
from areal_ray.run import RunDir
from areal_ray.run.restore_deaths import given_up
from areal_ray.train.loop import Progress
from areal_ray.train.receipt import receipt
from areal_ray.train.recovery import RecoverHandler
from areal_ray.train.tracking import StepMetrics


class WatchedCatalog(Catalog):
    """The catalog as a restore goes along it: it tells the ledger which checkpoint is about to be restored.

    One in whose restore workers have died too often has that as its problem.

    Args:
        run: the run directory.
        attempt: of this start of the workers.
        say: prints a line for the user.
    """

    def __init__(self, run: RunDir, attempt: int, say: Callable[[str], None]) -> None:
        super().__init__(run.storage)
        self._ledger, self._attempt, self._say = run, attempt, say

    def entry(self, name: str) -> Entry:
        entry = super().entry(name)
        if entry.problem is not None:
            return entry
        if times := given_up(self._ledger.turning_points()).get(name):
            text = f"workers died {times} times in a row while it was being restored"
            return replace(entry, manifest=None, problem=text)
        self._ledger.note("restoring", self._say, attempt=self._attempt, checkpoint=name)
        return entry


@dataclass(frozen=True)
class _Source:
    """Source of a state: a checkpoint, or a copy in memory, by the name that a checkpoint of it would have."""

    name: str
    copy: Copy | None = None

    def __str__(self) -> str:
        return self.name if self.copy is None else f"step {self.copy.version[1]} from memory"


class Restore:
    """Restores the latest good state, takes back what is computed again, and shows a receipt of it.

    Args:
        run: the run directory.
        attempt: of this start of the workers.
        recover, progress, metrics: of the job.
        ranks: all ranks.
        say: prints a line for the user.
        planned_restart: exception that has the workers started again, made with a reason.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        recover: RecoverHandler,
        progress: Progress,
        metrics: StepMetrics,
        ranks: Ranks,
        say: Callable[[str], None],
        planned_restart: Callable[[str], Exception],
    ) -> None:
        self._run, self._attempt, self._recover, self._ranks = run, attempt, recover, ranks
        self._progress, self._metrics, self._say = progress, metrics, say
        self._planned_restart = planned_restart

    def at_start(self, workers: str, loaded: Callable[[], None] = lambda: None) -> None:
        """Restore the newest copy in memory or checkpoint, or begin at the beginning. A collective.

        Args:
            workers: on what the run goes on, for the screen.
            loaded: called when the state is there, before anything is told.

        Raises:
            RankError: if the receipt of the restore contradicts itself.
            TooManyFailedSaves, RuntimeError, ValueError: as `RecoverHandler.load`.
        """
        copy = self._recover.restore_from_memory()
        name = self._recover.load() if copy is None else Catalog.name(copy.version[1], copy.version[0])
        source = None if name is None else _Source(name, copy)
        where = {"checkpoint": None, "memory": name} if copy else {"checkpoint": name}
        loaded()

        def tell() -> None:
            reached = self._rewind(source, passed_over=copy is None and self._recover.is_older(name))
            if source is None:
                self._note("started", step=0, reached=reached)
                self._say(f"attempt {self._attempt}: {workers}, from the beginning")
                return
            self._receipt(source, "restored", f"attempt {self._attempt}: {workers}, ", reached=reached, **where)

        self._ranks.on_rank_zero(tell)

    def roll_back(self) -> bool:
        """Restore the last checkpoint in the middle of an attempt; False if there is none. A collective.

        Raises:
            Exception: a planned restart, if that checkpoint is damaged and an older one was loaded: what is saved from
                now on would not be newer than the damaged one, by its name.
            RankError, TooManyFailedSaves, RuntimeError, ValueError: as `at_start`.
        """
        newest = self._ranks.on_rank_zero(self._recover.newest)
        name = self._recover.load()
        if name is None:
            if self._ranks.rank == 0:
                self._say("there is no checkpoint to go back to: the step is left out and training goes on")
            return False
        if name != newest:
            raise self._planned_restart(f"went back past {newest} to {name}")
        source = _Source(name)

        def tell() -> None:
            self._rewind(source, passed_over=False)
            self._receipt(source, "rolled_back", "", checkpoint=name)

        self._ranks.on_rank_zero(tell)
        return True

    def _rewind(self, source: _Source | None, passed_over: bool) -> int:
        """Take back what is computed again; how far the run had come at least.

        If a later checkpoint was passed over, which may be readable the next time, what is taken back is kept for then.
        """
        reached = self._run.reached()
        try:
            (self._run.keep_rewound if passed_over else self._run.bring_back)(
                self._progress.step, self._progress.samples
            )
        except OSError as error:  # a gap in the logs is no reason not to train
            self._say(f"could not keep or bring back lines of the logs: {error}")
        self._metrics.rewind(self._progress.step if source else -1)  # the beginning has a line too, that of step 0
        self._run.rewind_samples(self._progress.samples)
        for line in self._run.damage():
            self._say(line)
        return reached

    def _receipt(self, source: _Source, event: str, prefix: str, **fields: Any) -> None:
        """Compare what is there now with what was saved, write it down and show it."""
        directory = Catalog(self._run.storage).directory(source.name)
        stored = source.copy if source.copy is not None else StoredState(directory)
        compared = receipt(stored.values, stored.info, self._recover.values(), self._recover.info)
        step = self._progress.step
        self._note(event, step=step, **fields, **compared.event())
        self._say(f"{prefix}restored {source}, going on with step {step + 1}")
        for line in compared.text().splitlines():
            self._say(line)

    def _note(self, event: str, **fields: Any) -> None:
        self._run.note(event, self._say, attempt=self._attempt, **fields)

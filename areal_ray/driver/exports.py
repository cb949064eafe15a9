"""Exports of a run while it trains: made from committed checkpoints, in a process beside the driver, one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.config import Config
from areal_ray.run import RunDir
from areal_ray.run.fence import RunTaken
from areal_ray.tools.export import Form, TokenNames
from areal_ray.tools.export.folder import FOLDER, clear, discard, export_name, finished, keep_newest, new_token
from areal_ray.tools.export.process import ExportProcess

_LOOK_S = 5.0  # between two looks for new checkpoints: a listing of the run directory
_LISTEN_S = 0.2  # between two looks whether somebody has asked to stop
_END_S = 10.0  # for a thread that is told to end


def export_form(config: Config) -> Form:
    """The form of a run's exports. Unlike those of `ckpt export`, tokenizer and code are those of the configuration."""
    wanted = config.export
    assert wanted is not None
    names = TokenNames(wanted.bos_token, wanted.eos_token, wanted.pad_token)
    size = int(wanted.shard_mb * 1e6)
    return Form(size, config.data.tokenizer, wanted.dtype, names, wanted.model_class)


class Exporter:
    """Exports checkpoints of a run as they are due. What fails is said once, noted, and in the way of nothing.

    One thread looks for checkpoints that are due and keeps them from being deleted until their turn has come (an hour
    at most), another has them exported. Exports that were killed, or were never made, are made when the run is started
    again, if their checkpoints are still there. If another job takes the run over, nothing more is made or written.

    Args:
        config: with `export`.
        run: the run directory.
        search_path: folders with the user's own code.
        say: prints a line for the user.
        look_s: seconds between two looks.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        search_path: Sequence[str],
        say: Callable[[str], None],
        look_s: float = _LOOK_S,
    ) -> None:
        assert config.export is not None
        self._wanted, self._run, self._say, self._look_s = config.export, run, say, look_s
        self._catalog, self._folder = Catalog(run.storage), run.storage.sub(FOLDER)
        self._job: Mapping[str, Any] = {
            "run": run.storage.location,
            "s3": asdict(config.run.s3),
            "job": run.fence.job,
            "search_path": list(search_path),
            "form": asdict(export_form(config)),
            "adapter": None if config.adapter is None else asdict(config.adapter),
        }
        self._process = ExportProcess()
        self._stop, self._found = threading.Event(), threading.Event()
        self._busy = threading.Lock()  # held by who makes exports
        self._looking = threading.Lock()  # held by who reads or changes the next three
        self._locks: dict[str, ExitStack] = {}
        self._tried = set[str]()  # names of checkpoints about which there is nothing more to do
        self._current: str | None = None  # that is being exported
        self._failed = self._cleared = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Look for checkpoints that are due, and export them, while the block lasts. Then what is under way is ended.

        To be entered by who holds the lease and has taken the fence.
        """
        threads = [threading.Thread(target=each, name="exports", daemon=True) for each in (self._watch, self._work)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop()
            for thread in threads:
                thread.join(_END_S)
            self._unlock()

    def stop(self) -> None:
        """End what is under way, and begin nothing more. From any thread; does not wait."""
        self._stop.set()
        self._found.set()
        self._process.end()

    def finish(self, name: str | None, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Make the exports that are still due, and that of the end of the run; to be called when nothing trains.

        Args:
            name: of the last checkpoint of a run that has come to its end; None: it has stopped, and may go on.
            interrupted: whether to give up; asked every now and then.

        Raises:
            RunTaken: if the run is another job's by now.
        """
        over = threading.Event()

        def listen() -> None:
            while not over.wait(_LISTEN_S):
                if interrupted():
                    self.stop()
                    return

        threading.Thread(target=listen, name="interrupted exports", daemon=True).start()
        try:
            with self._busy:
                self._make_due()
                if name is not None and self._lacks(name) and not self._stop.is_set():
                    step = self._catalog.version(name)[1]
                    self._say(f"exporting {name} to {self._folder.location}/{export_name(step)}")
                    self._make(name)
        except OSError as error:
            self._complain(name or "checkpoints", str(error))
        finally:
            over.set()
            self._unlock()

    def is_done(self, name: str | None) -> bool:
        """Whether there is nothing left for `finish` to do."""
        with self._looking:
            return not self._lacks(name) and not self._due()

    def _lacks(self, name: str | None) -> bool:
        if name is None or not self._wanted.at_end:
            return False
        return self._catalog.version(name)[1] not in finished(self._folder)

    def _watch(self) -> None:
        while not self._stop.wait(self._look_s):
            self._while_ours(self._see)

    def _see(self) -> None:
        self._run.fence.check()  # also while an export is made, which is ended then
        if self._look():
            self._found.set()

    def _work(self) -> None:
        with self._busy:
            self._while_ours(self._clear)
        while not self._stop.is_set():
            self._found.wait()
            self._found.clear()
            with self._busy:
                self._while_ours(self._make_due)

    def _while_ours(self, work: Callable[[], None]) -> None:
        try:
            try:
                work()
            except OSError as error:  # storage that is away for now
                self._complain("checkpoints", str(error))
        except RunTaken:  # whoever holds the lease for this driver says so
            self.stop()

    def _clear(self) -> None:
        """Delete, once, what drivers before this one have left of exports."""
        if self._cleared:
            return
        self._cleared = True
        self._run.fence.check()
        try:
            clear(self._folder)
        except OSError as error:
            self._say(f"could not delete what is left of earlier exports: {error}")

    def _look(self) -> list[str]:
        """As `_due`; they are locked, and those that are not due any more are not."""
        with self._looking:
            names = self._due()
            for name in names:
                if name not in self._locks:
                    self._locks[name] = lock = ExitStack()
                    lock.enter_context(read_lock(self._catalog.directory(name)))
            for name in self._locks.keys() - {*names, self._current}:
                self._locks.pop(name).close()
            return names

    def _due(self) -> list[str]:
        """Names of committed checkpoints that are to be exported and are not, oldest first.

        A listing. Of exports and checkpoints about which there is nothing more to do nothing is asked again.
        """
        every = self._wanted.every_steps
        if every is None:
            return []
        newest: dict[int, str] = {}
        for _, step, name in self._catalog.names():  # newest attempt first
            if step % every == 0 and name not in self._tried:
                newest.setdefault(step, name)
        saved = {step: name for step, name in newest.items() if self._catalog.is_committed(name)}
        if not saved:
            return []
        there = finished(self._folder)
        # Not those that would be deleted at once, as newer ones are there or wait.
        kept = sorted({*there, *saved})[-(self._wanted.keep or 0) :]
        due = [step for step in sorted(saved) if step in kept and step not in there]
        self._tried.update(name for step, name in saved.items() if step not in due)
        return [saved[step] for step in due]

    def _make_due(self) -> None:
        self._clear()
        while not self._stop.is_set() and (due := self._look()):
            self._make(due[0])

    def _make(self, name: str) -> None:
        with self._looking:
            self._tried.add(name)
            self._current = name
        step, token, began = self._catalog.version(name)[1], new_token(), time.monotonic()
        try:
            answer = self._in_process({**self._job, "checkpoint": name, "step": step, "token": token})
        except OSError as error:  # no process could be made
            answer = {"error": str(error)}
        with self._looking:
            self._current = None
            if (lock := self._locks.pop(name, None)) is not None:
                lock.close()
            if answer is None:  # ended together with the run
                self._tried.discard(name)
        if answer is None or "error" in answer:
            with suppress(OSError):  # then the next driver clears it
                discard(self._folder, step, token)
            if answer is not None:
                self._complain(name, answer["error"])
            return
        place = f"{self._folder.location}/{export_name(step)}"
        self._say(f"exported {name} to {place}")
        seconds = round(time.monotonic() - began, 2)
        self._run.note("exported", self._say, step=step, checkpoint=name, bytes=answer["bytes"], took_s=seconds)
        try:
            keep_newest(self._folder, self._wanted.keep)
        except OSError as error:
            self._say(f"could not delete an earlier export: {error}")

    def _in_process(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        return self._process.run(job)

    def _unlock(self) -> None:
        with self._looking:
            for lock in self._locks.values():
                lock.close()
            self._locks.clear()

    def _complain(self, name: str, error: str) -> None:
        self._run.note("export_failed", self._say, checkpoint=name, error=error[:500])
        if not self._failed:
            again = "it is tried again when the run is started again; training goes on"
            self._say(f"exporting {name} failed: {error}; {again}, and later failures stand in the ledger only")
        self._failed = True

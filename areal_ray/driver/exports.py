"""Exports of a run while it trains: made from committed checkpoints, in a process beside the driver, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import areal_ray
from areal_ray.checkpoint import Catalog
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.config import Config
from areal_ray.run import RunDir
from areal_ray.tools.export import Form, TokenNames
from areal_ray.tools.export.folder import FOLDER, export_name, finished, keep_newest

_LOOK_S = 5.0  # between two looks for new checkpoints: a listing of the run directory
_LISTEN_S = 0.2  # between two looks whether somebody has asked to stop
_END_S = 10.0  # for a process that is told to end


def export_form(config: Config) -> Form:
    """The form of a run's exports. Unlike those of `ckpt export`, tokenizer and code are those of the configuration."""
    wanted = config.export
    assert wanted is not None
    names = TokenNames(wanted.bos_token, wanted.eos_token, wanted.pad_token)
    size = int(wanted.shard_mb * 1e6)
    return Form(size, config.data.tokenizer, wanted.dtype, names, wanted.model_class)


class Exporter:
    """Exports checkpoints of a run as they are due. What fails is said once, noted, and in the way of nothing.

    A checkpoint that is due is kept from being deleted until its turn has come (an hour at most). Exports that were
    killed, or were never made, are made when the run is started again, if their checkpoints are still there.

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
        self._config, self._wanted, self._run, self._say, self._look_s = config, config.export, run, say, look_s
        self._catalog, self._folder = Catalog(run.storage), run.storage.sub(FOLDER)
        form = export_form(config)
        job = {"run": run.storage.location, "s3": asdict(config.run.s3), "search_path": list(search_path)}
        self._job: Mapping[str, Any] = {**job, "form": asdict(form)}
        self._locks: dict[str, ExitStack] = {}
        self._tried = set[str]()  # names of checkpoints
        self._failed = False
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._busy = threading.Lock()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Look for checkpoints that are due, in a thread, while the block lasts. Then what is under way is ended."""
        thread = threading.Thread(target=self._watch, name="exports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._end_process()
            thread.join(_END_S)
            self._unlock()

    def finish(self, name: str, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Make the exports that are still due, and that of the end of the run; to be called when it has ended.

        Args:
            name: of its last checkpoint.
            interrupted: whether to give up; asked every now and then.
        """
        over = threading.Event()

        def listen() -> None:
            while not over.wait(_LISTEN_S):
                if interrupted():
                    self._stop.set()
                    self._end_process()
                    return

        threading.Thread(target=listen, name="interrupted exports", daemon=True).start()
        try:
            with self._busy:
                self._make_due()
                if self._lacks(name) and not self._stop.is_set():
                    step = self._catalog.version(name)[1]
                    self._say(f"exporting {name} to {self._folder.location}/{export_name(step)}")
                    self._make(name)
        except OSError as error:
            self._complain(name, str(error))
        finally:
            over.set()
            self._unlock()

    def is_done(self, name: str) -> bool:
        """Whether there is nothing left to export of a run whose last checkpoint this is."""
        return not self._lacks(name) and not self._due()

    def _lacks(self, name: str) -> bool:
        return self._wanted.at_end and self._catalog.version(name)[1] not in finished(self._folder)

    def _unlock(self) -> None:
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def _watch(self) -> None:
        while not self._stop.wait(self._look_s):
            with self._busy:
                try:
                    self._make_due()
                except OSError as error:  # storage that is away for now
                    self._complain("checkpoints", str(error))

    def _due(self) -> list[str]:
        """Names of committed checkpoints that are to be exported and are not, oldest first; they are locked."""
        every = self._wanted.every_steps
        if every is None:
            return []
        newest: dict[int, str] = {}
        for _, step, name in self._catalog.names():  # newest attempt first
            if step % every == 0 and name not in self._tried:
                newest.setdefault(step, name)
        if not newest:
            return []
        there = finished(self._folder)
        due = {step: name for step, name in sorted(newest.items()) if step not in there}
        due = {step: name for step, name in due.items() if self._catalog.is_committed(name)}
        # Not those that would be deleted at once, as newer ones are there or wait.
        kept = sorted({*there, *due})[-(self._wanted.keep or 0) :]
        names = [name for step, name in due.items() if step in kept]
        for name in names:
            if name not in self._locks:
                self._locks[name] = lock = ExitStack()
                lock.enter_context(read_lock(self._catalog.directory(name)))
        return names

    def _make_due(self) -> None:
        while (due := self._due()) and not self._stop.is_set():
            self._make(due[0])

    def _make(self, name: str) -> None:
        self._tried.add(name)
        step, began = self._catalog.version(name)[1], time.monotonic()
        answer = self._in_process({**self._job, "checkpoint": name, "step": step})
        if (lock := self._locks.pop(name, None)) is not None:
            lock.close()
        if answer is None:  # ended together with the run
            self._tried.discard(name)
            return
        if "error" in answer:
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
        """What came of an export in a process of its own; None if it was ended because the run has."""
        command = [sys.executable, "-m", "areal_ray.tools.export"]
        # A session of its own: Ctrl-C is for the driver. It ends with this process, by its input.
        self._process = process = subprocess.Popen(
            command,
            text=True,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if self._stop.is_set():
            process.kill()
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
        reading.start()
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        lines = process.stdout.readlines()  # until it ends
        with suppress(BrokenPipeError):
            process.stdin.close()
        status = process.wait()
        reading.join(_END_S)
        self._process = None
        if self._stop.is_set() and status != 0:
            return None
        try:
            answer: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            text = errors[-1].strip() if errors else "it said nothing"
            return {"error": f"the process ended with status {status}: {text[:500]}"}
        return answer

    def _end_process(self) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()

    def _complain(self, name: str, error: str) -> None:
        if not self._failed:
            again = "it is tried again when the run is started again; training goes on"
            self._say(f"exporting {name} failed: {error}; {again}, and later failures stand in the ledger only")
        self._failed = True
        self._run.note("export_failed", self._say, checkpoint=name, error=error[:500])


def _environment() -> dict[str, str]:
    """That of this process, with this package, wherever it was imported from, and without GPUs."""
    root = str(Path(areal_ray.__file__).parents[1])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}

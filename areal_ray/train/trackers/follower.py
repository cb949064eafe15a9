"""A thread that brings a tracker what metrics.jsonl has."""

from __future__ import annotations

import json
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from areal_ray.run import RunDir
from areal_ray.train.sinks import MetricsSink

_WAITING = 1000  # logged steps; more are read from metrics.jsonl when the tracker takes something again
_NOTABLE = ("restored", "started", "saved", "save_failed", "bad_step")


class Cursor:
    """How far a tracker has come: a small file of the run directory, written after each step that it took.

    Args:
        run: the run directory.
        name: of the tracker, unique in the run.
    """

    def __init__(self, run: RunDir, name: str) -> None:
        self._storage, self._name = run.storage.sub("trackers"), f"{name}.json"
        kept: Any = None
        if self._storage.size(self._name) is not None:
            try:
                kept = json.loads(self._storage.read(self._name))
            except ValueError:  # torn or edited: the tracker is told everything once more
                kept = None
        kept = kept if isinstance(kept, dict) else {}
        step, known = kept.get("step"), kept.get("id")
        self.step: int = step if isinstance(step, int) else -1
        self.id: str = known if isinstance(known, str) else secrets.token_hex(8)

    def move(self, step: int) -> None:
        """Write down the last step that the tracker has (OSError)."""
        self.step = step
        self._storage.ensure()
        self._storage.replace(self._name, json.dumps({"id": self.id, "step": step}).encode())


class Follower:
    """A MetricsSink that hands everything to a tracker in a thread, of which neither failures nor waits reach training.

    A tracker gets each logged step once, in order, whatever happens to the worker or to the tracker: how far it has
    come stands in the run directory, and what it lacks at a start, or after a time in which it took nothing, is read
    from metrics.jsonl. Steps that are computed again are taken back first (`rewind`). A tracker that raises is left
    out from then on; that is said once.

    Args:
        name: of the tracker, for what is said of it.
        make: makes the tracker; called in the thread, as it may wait for a network.
        run: the run directory.
        cursor: how far the tracker has come.
        say: prints a line for the user.
        close_s: longest wait for its end, in seconds.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], MetricsSink],
        run: RunDir,
        cursor: Cursor,
        say: Callable[[str], None],
        close_s: float = 10.0,
    ) -> None:
        self._name, self._make, self._run, self._cursor = name, make, run, cursor
        self._say, self._close_s = say, close_s
        self._work: deque[Callable[[MetricsSink], None]] = deque()
        self._changed = threading.Condition()  # its lock is taken again by whoever has it
        self._logged = 0  # steps among the work that waits
        self._missed: int | None = None  # the last step that did not find room
        self._ended = self._left_out = False
        run.listen(self._heard)
        self._thread = threading.Thread(target=self._follow, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        values = dict(values)

        def take(sink: MetricsSink) -> None:
            with self._changed:
                self._logged -= 1
            self._hand(sink, step, values)

        with self._changed:
            # In order: while some are missing, those after them are, too.
            if self._missed is None and self._logged < _WAITING:
                self._logged += 1
                self._add(take)
                return
            first, self._missed = self._missed is None, step
        if first and not self._left_out:
            self._say(f"the tracker {self._name} takes nothing after step {self._cursor.step}: it gets the rest later")

    def rewind(self, step: int) -> None:
        def go_back(sink: MetricsSink) -> None:
            # Also where it has come less far: the step after the cursor may have been taken, and not written down.
            self._cursor.move(min(self._cursor.step, step))
            has = sink.rewind(self._cursor.step)
            if has is not None:
                self._cursor.move(has)
            self._catch_up(sink, step)

        with self._changed:
            self._missed = None  # steps up to this one are caught up with, those after it come again
            self._add(go_back)

    def close(self) -> None:
        """Close it, and wait a little: one that waits for the network must not keep a failure from being noticed."""

        def end(sink: MetricsSink) -> None:
            self._catch_up_missed(sink)
            sink.close()

        with self._changed:
            self._add(end)
            self._ended = True
            self._changed.notify()
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._say(f"the tracker {self._name} has not closed in {self._close_s:.0f} s")

    def _heard(self, event: Mapping[str, Any]) -> None:
        """Hand on an event of the ledger, if the tracker takes events."""
        if event["event"] in _NOTABLE and len(self._work) < 2 * _WAITING:
            self._add(lambda sink: sink.event(dict(event)) if hasattr(sink, "event") else None)

    def _add(self, work: Callable[[MetricsSink], None]) -> None:
        with self._changed:
            if not self._left_out:
                self._work.append(work)
                self._changed.notify()

    def _follow(self) -> None:
        try:
            self._cursor.move(self._cursor.step)  # its id, before anybody hears of it: else a kill makes two runs
            sink = self._make()
            while (work := self._next()) is not None:
                work(sink)
                if not self._work:
                    self._catch_up_missed(sink)
        except Exception as error:  # noqa: BLE001  (the tracker's; training is worth more than its curve)
            with self._changed:
                self._left_out = True
                self._work.clear()
            text = " ".join(str(error).split())[:300]
            self._say(f"the tracker {self._name} failed, and is left out from now on: {type(error).__name__}: {text}")

    def _next(self) -> Callable[[MetricsSink], None] | None:
        """The next piece of work; None once there is none and will be none."""
        with self._changed:
            while not self._work:
                if self._ended:
                    return None
                self._changed.wait()
            return self._work.popleft()

    def _catch_up_missed(self, sink: MetricsSink) -> None:
        with self._changed:
            missed, self._missed = self._missed, None
        if missed is not None:
            self._catch_up(sink, missed)

    def _catch_up(self, sink: MetricsSink, step: int) -> None:
        """Hand on the steps up to this one that the tracker lacks."""
        if self._cursor.step >= step:
            return
        self._run.flush_metrics()
        for line in self._run.metrics_after(self._cursor.step):
            if line["step"] <= step:
                self._hand(sink, line["step"], {name: value for name, value in line.items() if name != "step"})

    def _hand(self, sink: MetricsSink, step: int, values: Mapping[str, float]) -> None:
        if step > self._cursor.step:
            sink.log(step, values)
            self._cursor.move(step)

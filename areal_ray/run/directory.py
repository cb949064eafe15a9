"""The run directory: config, metrics, event log and result of one run, beside its checkpoints."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from areal_ray.run.fence import FENCE, Fence
from areal_ray.run.logs.event_index import HISTORY, NEWEST, EventIndex
from areal_ray.run.logs.event_log import open_log
from areal_ray.run.logs.log_schema import is_batch, is_event, is_metric
from areal_ray.run.logs.rewound import REWOUND, Rewindable, RewoundLines
from areal_ray.run.shared_storage import TOKEN
from areal_ray.run.stop_request import STOP
from areal_ray.storage import NotAFile, Storage, set_obstacle_aside

CONFIG, METRICS, EVENTS, SAMPLES, RESULT = "config.yaml", "metrics", "events", "samples", "result.json"
EVENT_INDEX, REPORT = "events.index.json", "report.html"
DATA = "data.json"  # which prepared corpora the run trains on
CHECKPOINTS = "checkpoints.json"  # index of the checkpoints, see checkpoint/catalog.py
GENERATIONS = "generations"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints in a run directory
_OTHERS = (DATA, REPORT, FENCE, TOKEN, STOP, REWOUND)  # files of which each is written whole
_INDEX_EVERY = 4096  # events of one process: what a reader finds behind the index stays below a few megabytes


class RunDir:
    """Reads and writes the files of a run. Written by rank 0 and by the driver, never by two at once but for events.

    Args:
        storage: `<run.storage_path>/<run.name>`.
        job: identifier of the job that writes here, see `Fence`; the logs and the result may then raise RunTaken.
    """

    def __init__(self, storage: Storage, job: str | None = None) -> None:
        self.storage, self.fence = storage, Fence(storage, job)
        may_write = self.fence.check
        self._events = open_log(storage, EVENTS, at_once=True, is_good=is_event, may_write=may_write)
        self._metrics = open_log(storage, METRICS, at_once=False, is_good=is_metric, may_write=may_write)
        self._samples = open_log(storage, SAMPLES, at_once=False, is_good=is_batch, may_write=may_write)
        self._index = EventIndex(storage, EVENT_INDEX, self._events)
        metrics, samples = Rewindable(self._metrics, "step", is_metric), Rewindable(self._samples, "first", is_batch)
        self._rewound = RewoundLines(storage, {METRICS: metrics, SAMPLES: samples})
        self._told = 0
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return RunDir, (self.storage, self.fence.job)

    @property
    def ledger(self) -> str:
        """Location of the event log, as a user would type it."""
        return self._events.location

    def exists(self) -> bool:
        """Whether there is a run in this directory."""
        return bool(self.storage.names())

    def clear(self, say: Callable[[str], None]) -> None:
        """Set aside what has the name of one of the run's own files and cannot be read as one; see `storage.obstacles`.

        To be called by who holds the lease.

        Args:
            say: prints a line for the user, for each.

        Raises:
            OSError: if it cannot be set aside, or the storage is away.
        """
        set_obstacle_aside(self.storage, f"{EVENTS}.jsonl", self.turning_points, say)
        set_obstacle_aside(self.storage, f"{METRICS}.jsonl", self.reached, say)
        for name in (f"{SAMPLES}.jsonl", CONFIG, RESULT, EVENT_INDEX, CHECKPOINTS, SNAPSHOT, *_OTHERS):
            set_obstacle_aside(self.storage, name, partial(self.storage.read_range, name, 0, 1), say)

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to the ledger, durable on return.

        Raises:
            OSError: if it cannot be written; it then goes with the next one that this process writes.
        """
        event = {"time": round(time.time(), 3), "event": kind, **fields}
        self._events.append(event)
        for listener in self._listeners:  # afterwards: of a run that another job has taken over nothing is told
            listener(event)
        self._told += 1
        if self._told % _INDEX_EVERY == 0:
            self._write_index()

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Have the events that this process adds to the ledger told to a listener, which must neither fail nor wait."""
        self._listeners.append(listener)

    def note(self, kind: str, complain: Callable[[str], None], **fields: Any) -> None:
        """Add a line as `event` does; if it cannot be written now, tell `complain`: the work at hand matters more."""
        try:
            self.event(kind, **fields)
        except OSError as error:
            complain(f"could not write to the ledger: {error}")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The ledger, oldest first; only events of one kind if given.

        All of it is read, however long, unless the kind is one of `event_index.HISTORY`.
        """
        if kind in HISTORY:
            return [event for event in self._index.events() if event["event"] == kind]
        return [event for event in self._events.lines() if kind in (None, event["event"])]

    def each_event(self) -> Iterator[dict[str, Any]]:
        """The ledger, oldest first, event by event."""
        return self._events.lines()

    def turning_points(self) -> list[dict[str, Any]]:
        """The events that a start or a restart asks for, oldest first: see `event_index`.

        Costs what the ledger has become longer since a process of the run last wrote the index: a few megabytes.
        """
        return self._index.events()

    def newest(self, kind: str) -> dict[str, Any] | None:
        """The newest event of one of the kinds in `event_index.NEWEST`; None if there is none."""
        assert kind in NEWEST, kind
        return next((event for event in reversed(self._index.events()) if event["event"] == kind), None)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps, in order."""
        return sorted(self._metrics.lines(), key=lambda line: line["step"])  # clocks of different nodes may differ

    def each_metric(self) -> Iterator[dict[str, Any]]:
        """The logged steps, line by line, nearly in order."""
        return self._metrics.lines()

    def events_of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds, oldest first. The ledger is looked through, but only they are decoded."""
        wanted = re.compile(rb'"event": ?"(?:%s)"' % "|".join(kinds).encode())
        found = self._events.since({}, wanted)
        return self._events.sort(found[0]) if found else []

    def sampled_metrics(self, lines: int) -> list[dict[str, Any]]:
        """About so many of the logged steps, evenly over the run, with all evaluations; every line of a short run.

        The log is looked through, but only those lines are decoded: half a second for a million of them.
        """
        last = self.reached()
        zeros = max(0, math.ceil(math.log10(max(last, 1) / lines)))
        round_steps = rb'"step": ?\d*0{%d}[,}]' % zeros if zeros else rb'"step": ?\d'
        found = self._metrics.since({}, re.compile(rb'%s|"held_out|"step": ?%d[,}]' % (round_steps, last)))
        return sorted(found[0] if found else [], key=lambda line: line["step"])

    def log_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Add the line of one step; an OSError as for `event`. On object storage it is written in the background."""
        self._metrics.append({"step": step, **values})

    def log_samples(self, first: int, ids: list[int]) -> None:
        """Add the line of one global batch: the cursor at which it begins, the numbers of its sequences."""
        self._samples.append({"first": first, "ids": ids})

    def samples(self) -> list[dict[str, Any]]:
        """The global batches, in order, if the run was asked to write them down (logging.sample_ids)."""
        return sorted(self._samples.lines(), key=lambda line: line["first"])

    def keep_rewound(self, step: int, samples: int) -> None:
        """Keep a copy of the lines behind a step and from a cursor on, which are about to be taken back (OSError)."""
        self.fence.check()
        self._rewound.keep({METRICS: step, SAMPLES: samples - 1})

    def bring_back(self, step: int, samples: int) -> None:
        """Add the lines that `keep_rewound` has kept, up to a step and a cursor (OSError)."""
        self.fence.check()
        self._rewound.bring_back({METRICS: step, SAMPLES: samples - 1})

    def rewind_metrics(self, step: int) -> None:
        """Take back the lines of steps after `step`: a restored run computes them once more, and each stands once."""
        self._metrics.keep(lambda line: line["step"] <= step)

    def rewind_samples(self, samples: int) -> None:
        """Take back the lines of batches from cursor `samples` on."""
        self._samples.keep(lambda line: line["first"] < samples)

    def reached(self) -> int:
        """The last step that has a line: so far the run has come at least. Reads the end of the metrics."""
        return max((line["step"] for line in self._metrics.tail()), default=0)

    def metrics_after(self, step: int) -> list[dict[str, Any]]:
        """The logged steps after `step`, in order; reads the end of the metrics only, if they are there."""
        end = self._metrics.tail()
        lines = end if end and min(line["step"] for line in end) <= step else list(self._metrics.lines())
        return sorted((line for line in lines if line["step"] > step), key=lambda line: line["step"])

    def flush_metrics(self) -> None:
        """Wait until all logged steps are durable (OSError)."""
        self._metrics.flush()

    def last_metrics(self) -> list[dict[str, Any]]:
        """Some of the last logged steps, in order. Reads the end of the metrics."""
        return sorted(self._metrics.tail(), key=lambda line: line["step"])

    def flush(self) -> None:
        """Wait until everything is durable (OSError)."""
        self._events.flush()
        self._metrics.flush()
        self._samples.flush()

    def write_config(self, text: str) -> None:
        self.storage.replace(CONFIG, text.encode())

    def revision(self) -> str | None:
        """The git revision in the comments of config.yaml; None if there is none."""
        if self.storage.size(CONFIG) is None:
            return None
        found = re.search(rb"^# git revision: (\S+)", self.storage.read(CONFIG), re.M)
        return found[1].decode(errors="replace") if found else None

    def write_data(self, data: dict[str, dict[str, Any]]) -> None:
        """Note what the run trains on: path, fingerprint and settings of the corpus of each source, by its name."""
        self.storage.replace(DATA, json.dumps(data, indent=2).encode() + b"\n")

    def data(self) -> dict[str, dict[str, Any]] | None:
        """What `write_data` has noted; None if there is nothing, or it is no longer one."""
        found = self._read_object(DATA) or {}
        good = all(type(each) is dict and {"path", "fingerprint"} <= each.keys() for each in found.values())
        return found if found and good else None

    def write_result(self, result: dict[str, Any]) -> None:
        self.fence.check()
        self.storage.replace(RESULT, json.dumps(result, indent=2).encode() + b"\n")

    def write_generations(self, step: int, made: list[dict[str, Any]]) -> None:
        """Write what the model has made of prompts after a step; that of a step that is computed again is replaced."""
        self.fence.check()
        folder = self.storage.sub(GENERATIONS)
        folder.ensure()
        content = json.dumps({"step": step, "generations": made}, indent=2, ensure_ascii=False)
        folder.replace(f"step-{step:08d}.json", content.encode(errors="replace") + b"\n")

    def write_report(self, text: str) -> None:
        self.storage.replace(REPORT, text.encode())

    def result(self) -> dict[str, Any] | None:
        """result.json; None if there is none, or it is no longer one."""
        return self._read_object(RESULT)

    def _read_object(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.storage.read(name))
        except (FileNotFoundError, NotAFile, ValueError, RecursionError):
            return None
        return found if type(found) is dict else None

    def damage(self) -> list[str]:
        """Sentences about lines of the logs that were found unreadable since this was asked for the last time."""
        return [news for log in (self._events, self._metrics, self._samples) if (news := log.news()) is not None]

    def next_attempt(self, last_saved: int, complain: Callable[[str], None] = print) -> int:
        """A number that no attempt has had; to be asked for once, at its beginning. It shuts earlier attempts out.

        Args:
            last_saved: the highest attempt among the checkpoints, should the ledger have been lost.
            complain: told if they could not be shut out.
        """
        attempt = max(self._index.last_attempt(), last_saved) + 1
        try:
            self.fence.begin(attempt)
        except OSError as error:  # a full disk, say, which earlier attempts cannot write to either
            complain(f"could not shut earlier attempts out: {error}")
        self._write_index(attempt)
        return attempt

    def _write_index(self, attempts: int = 0) -> None:
        with suppress(OSError):  # nothing depends on it: the next one reads more of the ledger
            self._index.write(attempts)

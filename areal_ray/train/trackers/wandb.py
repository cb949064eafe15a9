"""Weights & Biases, online or offline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

from areal_ray.train.trackers.subject import Subject

_FLUSH_S = 1.0  # instead of 15: what a kill costs the offline file is sent once more, but until then it is missing
_BLOCK = 32768
_WHOLE_OR_PIECE, _ENDS = (1, 2, 3, 4), (1, 4)  # kinds of LevelDB's records: whole, first, middle, last


class WandB:
    """A run in Weights & Biases, the same one across restarts and submissions.

    It takes no step back: of a step that is computed again the first values stay. They are the same but for rounding,
    unless a bad step between them was left out.

    Args:
        subject: the run.
        args: of `wandb.init`, such as project, entity, group, mode ("offline"), dir.
    """

    def __init__(self, subject: Subject, **args: Any) -> None:
        folder = {} if subject.folder is None else {"dir": subject.folder}
        settings = wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=_FLUSH_S)
        given = {"project": "areal_ray", "name": subject.name, **folder, **args}
        last = _last_step(Path(given.get("dir") or os.environ.get("WANDB_DIR") or "."), subject.id)
        self._run = wandb.init(id=subject.id, resume="allow", config=dict(subject.config), settings=settings, **given)
        about = {"revision": subject.revision, "run_directory": subject.location}
        self._run.config.update(about, allow_val_change=True)
        # Of what was sent before a kill some was lost; online the server knows how much, offline the files do.
        self._last = last if self._run.offline else self._run.starting_step - 1

    def rewind(self, step: int) -> int:
        """Take back nothing; the last step that there is."""
        return self._last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)
        self._last = step

    def event(self, event: Mapping[str, Any]) -> None:
        kept = {f"{event['event']}/{name}": event[name] for name in ("attempt", "step", "checkpoint") if name in event}
        self._run.summary.update(kept)

    def close(self) -> None:
        self._run.finish()


def _last_step(folder: Path, run_id: str) -> int:
    """The last step in the files of a run that were written offline; -1 if there is none."""
    last = -1
    for path in (folder / "wandb").glob(f"offline-run-*-{run_id}*/*.wandb"):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                last = max(last, *(int(item.value_json) for item in record.history.item if "_step" in _name(item)))
    return last


def _name(item: Any) -> tuple[str, ...]:
    return (item.key, *item.nested_key)


def records(path: Path) -> Iterator[bytes]:
    """The whole records of one of W&B's files; its library reads them in a program of its own only.

    LevelDB's log format, with a header of seven bytes.
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # no header fits before the end of the block
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind not in _WHOLE_OR_PIECE or at + 7 + length > len(data):  # being written, or lost with a kill
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in _ENDS:
            yield record
            record = b""

"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from areal_ray.train.trackers.subject import Subject


class TensorBoard:
    """A TensorBoard log. What is computed again is purged: TensorBoard shows the newer values of those steps.

    Args:
        subject: the run.
        log_dir: default `tensorboard` in the run directory.
    """

    def __init__(self, subject: Subject, log_dir: str | None = None) -> None:
        self._folder = log_dir or subject.folder_for("tensorboard", "log_dir")
        self._subject = subject
        self._writer: SummaryWriter | None = None

    def rewind(self, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        # https://www.tensorflow.org/api_docs/python/tf/compat/v1/SessionLog: a new start at a step hides what was there
        # from it on.
        self._writer = SummaryWriter(self._folder, purge_step=step + 1)
        if step < 0:
            self._writer.add_text("config", f"```json\n{json.dumps(self._subject.config, indent=1)}\n```", 0)
            self._writer.add_text("revision", self._subject.revision, 0)
            self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None  # made by `rewind`, which comes first
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def event(self, event: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.add_text(f"events/{event['event']}", _text(event), event.get("step", 0))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _text(event: Mapping[str, Any]) -> str:
    shown = ("attempt", "step", "checkpoint", "reason", "error")
    return ", ".join(f"{name} {event[name]}" for name in shown if event.get(name) is not None)

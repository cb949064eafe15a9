"""trackio: W&B's interface on a local database, by Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trackio
import trackio.run
import trackio.utils
from trackio.sqlite_storage import SQLiteStorage

from areal_ray.train.trackers.subject import Subject


def _say_nothing(*_: Any, **__: Any) -> None:
    """Instead of `print` in trackio, which has no switch for it: these lines would stand among those of the run."""


for _module in (trackio, trackio.run, trackio.utils):
    _module.print = _say_nothing


class Trackio:
    """A run in trackio, the same one across restarts and submissions.

    It takes no step back, see `WandB`.

    Args:
        subject: the run.
        args: of `trackio.init`, such as project and space_id.
    """

    def __init__(self, subject: Subject, **args: Any) -> None:
        given = {"project": "areal_ray", "embed": False, **args}
        self._project, self._name = given["project"], f"{subject.name}-{subject.id[:6]}"
        self._is_here = "space_id" not in args
        config = {**subject.config, "revision": subject.revision, "run_directory": subject.location}
        self._run = trackio.init(name=self._name, config=config, resume="allow", **given)

    def rewind(self, step: int) -> int:
        """Take back nothing; the last step that is in the database: what is sent gets there half a second later."""
        if not self._is_here:
            return step
        steps = SQLiteStorage.get_max_steps_for_runs(self._project)  # by the run's id; in older versions by its name
        return int(max(steps.get(key, -1) for key in (self._name, getattr(self._run, "id", None))))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # "time" is a word of trackio's own, which it would rename, with a warning among the lines of the run.
        self._run.log({"unix_time" if name == "time" else name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()

"""Frozen models of a run's objective: that they are the ones it began with, and what they are asked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

from areal_ray.checkpoint import Catalog
from areal_ray.config import Config, ConfigError, plugin
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine, Objective
from areal_ray.run import RunDir
from areal_ray.storage import storage_at
from areal_ray.train.answers import Answers, Rows
from areal_ray.worker.job import Data, load_data

_SET = "set-"  # how names of evaluation sets begin among all rows


class FrozenModels:
    """The frozen models of one rank's objective, which the engine holds, unless all that they are asked is known. Made
    before the engine; a collective.

    Args:
        config: of the run.
        run: its directory.
        ranks: all ranks.
        objective: whose models they are.
        before: fingerprints of those that the run has had so far, by name.
    """

    def __init__(
        self, config: Config, run: RunDir, ranks: Ranks, objective: Objective, before: Mapping[str, str]
    ) -> None:
        self._config, self._run, self._ranks, self._before = config, run, ranks, dict(before)
        self.wanted = objective.references
        self._answers: Answers | None = None
        self._known: Rows | None = None
        if objective.once:
            # Beside the prepared corpora of this place, whose names begin in another way.
            place = storage_at(config.run.storage_path, asdict(config.run.s3)).sub("data")
            settings = _settings(config)
            self._answers = Answers(place, objective, _rows(load_data(config, run, ranks)), ranks, settings)
            if "objective" not in config.run.allow_changes:
                self._known = self._answers.find(self._before)
        if self._known is not None:
            self.wanted = ()

    def check(self, engine: FSDPEngine) -> None:
        """Raise ConfigError, on every rank, if one is not the one that the run began with; see `check_references`."""
        check_references(self._before, engine.references, self._config)

    def described(self, engine: FSDPEngine) -> dict[str, dict[str, str]]:
        """Their fingerprints, for manifests; nothing if there are none."""
        found = self._before if self._known is not None else engine.references
        return {"references": found} if found else {}

    def data(self, engine: FSDPEngine, beat: Callable[[], None], say: Callable[[str], None]) -> Data:
        """The data to train and evaluate on, with what the models have been asked about them. A collective.

        Args:
            engine: initialised, with those that are wanted.
            beat: called while they are asked.
            say: prints a line.
        """
        if self._known is not None:
            return _data(self._known)
        if self._answers is None:
            return load_data(self._config, self._run, self._ranks)
        data = self._answers.ask(engine, self._config.train.micro_batch_size, beat, say)
        engine.release_references()
        return _data(data)


def _settings(config: Config) -> dict[str, str]:
    """What answers depend on beside the rows and the models, to the bit: runs that differ in it share none."""
    engine, model, objective = config.engine, config.model, config.objective
    named = asdict(objective) if plugin.is_plugin(objective.name) else objective.name
    computed = engine.precision, engine.tf32, model.attention, model.loss, config.train.micro_batch_size
    return {"computed": repr(computed), "objective": repr(named)}


def _rows(data: Data) -> Rows:
    return {"train": data.train, "held_out": data.held_out, **{f"{_SET}{name}": of for name, of in data.sets.items()}}


def _data(rows: Rows) -> Data:
    sets = {name.removeprefix(_SET): of for name, of in rows.items() if name.startswith(_SET)}
    return Data(rows["train"], rows["held_out"], sets)


def recorded_references(catalog: Catalog) -> dict[str, str]:
    """Fingerprints of the frozen models that the run has had so far, by name."""
    newest = catalog.newest()
    return {} if newest is None else dict(newest.info.get("references", {}))


def check_references(before: Mapping[str, str], now: Mapping[str, str], config: Config) -> None:
    """Compare fingerprints of frozen models, by name, with those of the run so far, if it had any.

    Raises:
        ConfigError: if one is another model now, and the run may not change it.
    """
    if "objective" in config.run.allow_changes:
        return
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            text = (
                f"the frozen model `{name}` is not the one that this run began with (fingerprint {now[name][:12]}, "
                f"then {before[name][:12]}): the files that it is read from have changed. Put them back, choose "
                "another run.name, or say run.allow_changes='[objective]'"
            )
            raise ConfigError("objective", text)

"""Sweeps that are killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.clusters.runs import Process, seen_events
from tests.ray.conftest import EXPERIMENT, SMALL, Run
from tests.ray.head import started_head

_STEPS = 60
_LONGER = (f"train.steps={_STEPS}", "eval.every_steps=10", "checkpoint.every_steps=10", "cluster.num_workers=1")
_ASHA: dict[str, Any] = {
    "space": {"optim.lr": {"grid": [1e-4, 1e-3, 1e-2, 1e-1]}},
    "scheduler": "asha",
    "grace_steps": 10,
    "reduction_factor": 2,
    "concurrent": 2,
}
_PBT: dict[str, Any] = {
    "space": {"optim.lr": {"log_uniform": [1e-5, 1e-1]}},
    "scheduler": "pbt",
    "trials": 2,
    "perturb_steps": 10,
    "grace_steps": 10,
    "quantile": 0.5,
    "concurrent": 2,
}


class Sweep:
    """A sweep in a folder, and what it has recorded."""

    def __init__(self, folder: Path, environment: dict[str, str], space: dict[str, Any]) -> None:
        self._folder, self._environment = folder, environment
        self.log, self._space = folder / "sweep.log", folder / "space.yaml"
        self._space.write_text(yaml.safe_dump(space))

    def start(self) -> Process:
        where = [f"run.storage_path={self._folder}", "run.name=it"]
        arguments = ["sweep", "--config", EXPERIMENT, "--space", str(self._space), *SMALL, *_LONGER, *where]
        return Process(self._environment, self.log, *arguments)

    def trials(self) -> dict[str, dict[str, Any]]:
        path = self._folder / "it-sweep" / "sweep.json"
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())["trials"] if path.exists() else {}
        return found

    def ended(self) -> set[str]:
        return {name for name, trial in self.trials().items() if trial["ended"]}

    def run(self, name: str) -> Run:
        return Run(self._folder, name)


def check_asha(folder: Path) -> None:
    """A sweep of four trials with ASHA is killed: what has ended is not run again, what has not resumes."""
    with started_head() as head:
        sweep = Sweep(folder, head.environment, _ASHA)

        def in_the_middle() -> list[str]:
            """Trials that have a checkpoint and are not near their end, once another one has ended."""
            left = [name for name in sweep.trials() if name not in sweep.ended()] if sweep.ended() else []
            saved = {name: [event["step"] for event in seen_events(sweep.run(name), "saved")] for name in left}
            return [name for name, steps in saved.items() if steps and max(steps) < _STEPS // 2]

        with sweep.start() as process:
            process.wait_for(in_the_middle, "no trial is in the middle of another")
            cut = in_the_middle()
            process.kill()
        ended = sweep.ended()
        print(f"  killed: {', '.join(sorted(ended))} have ended, {', '.join(cut)} not", flush=True)
        with sweep.start() as process:
            process.finish()
        assert f"{len(sweep.trials()) - len(ended)} of {len(sweep.trials())} trials are left" in process.text()
        assert len(sweep.trials()) == 4
        assert sweep.ended() == set(sweep.trials())
        for name in sorted(sweep.trials()):
            starts = len(sweep.run(name).events("submitted"))
            assert starts == 1 or name not in ended, f"{name} had ended, and was started {starts} times"
            restored = [event["step"] for event in seen_events(sweep.run(name), "restored")]
            assert restored or name not in cut, f"{name} has not resumed"
            print(f"  {name}: {starts} starts, restored at {restored}, {sweep.trials()[name]['ended']}", flush=True)
        print("  " + "\n  ".join(process.text().rpartition("\n\n")[2].splitlines()), flush=True)


def check_pbt(folder: Path) -> None:
    """A population of two: the one that is behind goes on from a checkpoint of the other, with other values."""
    with started_head() as head:
        sweep = Sweep(folder, head.environment, _PBT)
        with sweep.start() as process:
            process.finish()
        text = process.text()
        assert "goes on from where" in text, text
        assert sweep.ended() == set(sweep.trials())
        trained = 0
        for name in sorted(path.name for path in folder.glob("it-0?-g*")):
            run = sweep.run(name)
            if not (run.path / "events.jsonl").exists():  # it began with the other's last checkpoint
                print(f"  {name}: begins at the end, with {[path.name for path in run.path.glob('step-*')]}")
                continue
            (restored,) = run.events("restored")
            rates = {line["lr"] for line in run.lines("metrics.jsonl") if "lr" in line}
            print(f"  {name}: from step {restored['step']} on, rates up to {max(rates):.2e}")
            trained += 1
        assert trained, sweep.trials()
        print("  " + "\n  ".join(text.rpartition("\n\n")[2].splitlines()), flush=True)

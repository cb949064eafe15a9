"""Two runs on one cluster at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from areal_ray.storage import LocalStorage
from areal_ray.tools import checkpoints
from tests.clusters.runs import kill_worker, seen_events, train
from tests.ray.conftest import Run
from tests.ray.head import started_head

# A worker stands still where it is to be killed, so that nothing depends on how fast anything is.
_STOPS = (6, 10)
_ALONE = ("cluster.num_workers=1", "checkpoint.memory_every_steps=1", "logging.every_steps=1", "cluster.standbys=auto")
_HELD = (
    *_ALONE,
    "cluster.watchdog=null",
    f"faults=[{', '.join(f'{{kind: hang, rank: 0, step: {s}}}' for s in _STOPS)}]",
)
_SEEDS = {"a": 1, "b": 2}  # a run that took the other's copy or checkpoint would end in the other's bits


def check(folder: Path) -> None:
    """Two runs train at once and are killed alternately: each ends in the bits that it has alone."""
    with started_head() as head:
        alone = {name: _alone(head.environment, folder, name) for name in _SEEDS}
        runs = {name: Run(folder, name) for name in _SEEDS}
        with ExitStack() as stack:
            started = {
                name: stack.enter_context(train(head.environment, run, *_HELD, f"run.seed={_SEEDS[name]}"))
                for name, run in runs.items()
            }
            killed: dict[str, list[int]] = {name: [] for name in runs}
            for stop in range(len(_STOPS)):
                for name, run in runs.items():
                    started[name].wait_for(lambda run=run, n=stop: len(seen_events(run, "fault")) > n, "the stop")
                    killed[name].append(kill_worker(run))
                    print(f"  {name}: worker {killed[name][-1]} killed before step {_STOPS[stop]}", flush=True)
            for process in started.values():
                process.finish()
        for name, run in runs.items():
            _check_same(run, alone[name])
            assert [event["step"] for event in run.events("restored")] == [step - 1 for step in _STOPS], name
            assert all(event.get("memory") for event in run.events("restored")), run.events("restored")
        pids = [pid for run in runs.values() for event in run.events("attempt") for pid in event["pids"]]
        assert len(pids) == len(set(pids)) == 2 * (len(_STOPS) + 1), pids


def check_room_for_one(folder: Path) -> None:
    """There is room for one: the second waits and says so, also while the first one's worker is dead."""
    wide = ("cluster.resources_per_worker={CPU: 2}",)
    with started_head() as head:
        alone = {name: _alone(head.environment, folder, name) for name in _SEEDS}
        runs = {name: Run(folder, name) for name in _SEEDS}
        a, b = runs.values()
        with ExitStack() as stack:
            first = stack.enter_context(train(head.environment, a, *_HELD, *wide, "run.seed=1"))
            first.wait_for(lambda: seen_events(a, "fault"), "the first stop")
            second = stack.enter_context(train(head.environment, b, *_ALONE, *wide, "run.seed=2"))
            second.wait_for(lambda: "waiting for room" in second.text(), "the second says nothing")
            said = next(line for line in second.text().splitlines() if "waiting for room" in line)
            print(f"  {said.strip()}", flush=True)
            for number in range(1, len(_STOPS) + 1):
                kill_worker(a)
                first.wait_for(lambda n=number: len(seen_events(a, "restored")) == n, "the first does not come back")
                assert not seen_events(b, "attempt"), "the second has taken what was the first one's"
                if number < len(_STOPS):
                    first.wait_for(lambda n=number: len(seen_events(a, "fault")) > n, "the next stop")
            first.finish()
            second.finish()
        for name, run in runs.items():
            _check_same(run, alone[name])


def _alone(environment: Mapping[str, str], folder: Path, name: str) -> Run:
    run = Run(folder, f"{name}-alone")
    with train(environment, run, *_ALONE, f"run.seed={_SEEDS[name]}") as process:
        process.finish()
    return run


def _check_same(run: Run, alone: Run) -> None:
    places = [LocalStorage(each.path / each.result()["checkpoint"]) for each in (run, alone)]
    assert (found := checkpoints.differences(*places)) == [], found
    assert run.metrics() == alone.metrics()
    print(f"  {run.path.name}: {run.result()['restarts']} restarts, the bits of the run alone: {run.digest()[:16]}")
